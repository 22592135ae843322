"""What the sources share that look at every picture once: folders, sets of `datasets`, tar shards.

N pictures, W H pixels.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm.data.images import Pixels
from ldm.data.index import Index, digest_of
from ldm.errors import UserError

ADVICE = "put it back as it was, or run the same command again, which looks at what has changed"


class Indexed(ABC):
    """A source whose pictures are known before one is asked for.

    Attributes:
        index: what is known of them.
        texts: captions of each, put into words.
        decode: turns a picture's file into pixels.
    """

    index: Index
    texts: Sequence[Sequence[str]]
    decode: Callable[[bytes], Pixels]

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Return a picture's file.

        Raises:
            OSError, UserError: it cannot be had.
        """

    def told(self, index: int) -> str:
        """Return what a person calls a picture."""
        return self.index.names[index]

    def __len__(self) -> int:
        return len(self.index.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read and decode a picture.

        Raises:
            UserError: it is broken, or no longer what it was when the set was looked at.
        """
        told = self.told(index)
        if self.index.faults[index]:
            raise UserError(f"{told}: {self.index.faults[index]}")
        then = f"{told} was there when training began"
        try:
            encoded = self.read(index)
            if digest_of(encoded) != self.index.digests[index]:
                raise UserError(f"{then} and has changed since: {ADVICE}")
            return {"image": self.decode(encoded), "captions": self.texts[index]}
        except OSError as error:
            raise UserError(f"{then} and cannot be read now ({error.strerror or error}): {ADVICE}") from error
        except UserError as error:
            raise error if told in str(error) else UserError(f"{told}: {error}") from error

    def captions(self) -> Sequence[Sequence[str]]:
        return self.texts

    def sizes(self) -> NDArray[np.int32]:
        return self.index.sizes

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for picture, texts in zip(self.index.digests, self.texts, strict=True):
            digest.update(json.dumps([picture, *texts]).encode())
        return digest.hexdigest()
