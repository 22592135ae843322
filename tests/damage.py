"""Damage to files, drawn from a seeded generator: of any bytes, and such that leaves checksums right and gets further.

`damaged` gives a file's bytes with some edits in them; which kinds there are goes by its suffix.
"""

import io
import json
import math
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

TRAP = "fuzz_trap"  # a module that nothing may import
ESCAPES = ("../escaped", "../../escaped", "/tmp/../canary.png", "../canary.png", "../canary.txt", "~nobody/x")


class Payload:
    """Unpickled as what it was told to be: a call of anything."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 2**64, -(2**70), 10**30, 0.5, -0.0, 1e308, math.nan, math.inf, "",
    "a", "\0", "\ud800", "é" * 300, "x" * 5000, *ESCAPES, "/etc/passwd", "${oc.env:HOME}", "{0.__class__}", "%s%n",
    TRAP, f"{TRAP}.run", "os.system", [], {}, [[]], [None], [1, "a"], [10**9] * 3, {"a": {"b": []}},
    {"_target_": f"{TRAP}.run"}, {"__class__": TRAP}, {"auto_map": {"AutoModel": f"{TRAP}.run"}},
)  # fmt: skip
TOKENS = (
    b"null", b"1e400", b"-1", b"9" * 40, b"9" * 5000, b"NaN", b'"', b"'", b",", b":", b"{", b"}", b"[", b"\n", b"\r",
    b"\t", b"\0", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xf0\x9f\x99\x82", "\u202e".encode(),
    b"../", b"/etc/passwd", b"[" * 100_000, b'{"a":' * 20_000, b"- " * 3000, b"%s%n", b"${oc.env:HOME}", b"*a",
    b"&a [*a]", b"!!python/object/apply:os.system ['touch escaped']\n", f"!!python/name:{TRAP}.run ''".encode(),
    b"<html>", b"version https://git-lfs", b"\x7fELF", b"PK\x03\x04", b"=cmd|' /C calc'!A0", b"\x80\x04.",
    b"2001-02-30", b"0x1p9", f"_target_: {TRAP}.run\n".encode(), f'"_target_": "{TRAP}.run",'.encode(),
)  # fmt: skip
SIZES = tuple(struct.pack(form, value) for form, values in {
    "<H": (0, 1, 2**16 - 1), ">H": (2**15, 2**16 - 1), "<I": (0, 2**31 - 1, 2**31, 2**32 - 1), ">I": (2**24, 2**31 - 1,
    2**32 - 1), "<Q": (2**40, 2**63 - 1, 2**64 - 1), ">Q": (2**62,),
}.items() for value in values)  # fmt: skip

Edit = Callable[[Random, bytes], bytes]


# ------------------------------------------------------------------------------------------------------- any bytes


def place(rng: Random, content: bytes) -> int:
    """Choose a place, often near one of the ends, where headers and footers are."""
    end = len(content)
    return rng.choice((rng.randint(0, end), min(end, rng.randint(0, 64)), max(0, end - rng.randint(0, 64))))


def flip(rng: Random, content: bytes) -> bytes:
    edited = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8)) if content else 0):
        edited[rng.randrange(len(edited))] ^= rng.choice((1, 2, 4, 8, 16, 32, 64, 128, 255, rng.randint(1, 255)))
    return bytes(edited)


def cut(rng: Random, content: bytes) -> bytes:
    at = place(rng, content)
    return content[:at] + content[at + rng.choice((1, 4, rng.randint(1, 64), len(content))) :]


def insert(rng: Random, content: bytes) -> bytes:
    at = place(rng, content)
    return content[:at] + rng.choice((rng.randbytes(rng.randint(1, 16)), rng.choice(TOKENS))) + content[at:]


def overwrite(rng: Random, content: bytes) -> bytes:
    at, come = place(rng, content), rng.choice((rng.choice(SIZES), rng.choice(TOKENS)))
    return content[:at] + come + content[at + len(come) :]


def double(rng: Random, content: bytes) -> bytes:
    at = place(rng, content)
    piece = content[at : at + rng.choice((1, 16, 512, len(content)))]
    return content[:at] + piece * rng.choice((2, 2, 50)) + content[at + len(piece) :]


def swap(rng: Random, content: bytes) -> bytes:
    a, b = sorted((place(rng, content), place(rng, content)))
    size = min(rng.choice((1, 8, 64, 512)), b - a)
    return content[:a] + content[b : b + size] + content[a + size : b] + content[a : a + size] + content[b + size :]


ANY: tuple[Edit, ...] = (flip, flip, cut, insert, overwrite, double, swap)


# ---------------------------------------------------------------------------------------------- with a form inside


def odd_value(rng: Random, tree: Any) -> Any:
    """Put something else in the place of a value anywhere in a tree of lists and dicts."""
    spots: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            spots.append((node, key))
            walk(node[key])

    walk(tree)
    if not spots:
        return rng.choice(ODD)
    node, key = rng.choice(spots)
    kind = rng.randrange(6)
    if kind == 0:
        del node[key]
    elif kind == 1:
        other, other_key = rng.choice(spots)
        node[key] = json.loads(json.dumps(other[other_key]))
    elif kind == 2 and isinstance(node, dict):
        node[rng.choice(("_target_", "_class_name", "", "a", *node))] = rng.choice(ODD)
    elif kind == 3 and isinstance(node[key], int | float):
        node[key] = rng.choice((-node[key], node[key] + 1, node[key] * 2, node[key] * 10**6, node[key] / 3))
    else:
        node[key] = rng.choice(ODD)
    return tree


def in_json(rng: Random, content: bytes) -> bytes:
    return json.dumps(odd_value(rng, json.loads(content))).encode()


def in_json_line(rng: Random, content: bytes) -> bytes:
    lines = content.split(b"\n")
    i = rng.randrange(len(lines))
    lines[i] = in_json(rng, lines[i] or b"{}")
    return b"\n".join(lines)


def in_yaml(rng: Random, content: bytes) -> bytes:
    import yaml

    return yaml.safe_dump(odd_value(rng, yaml.safe_load(content)), allow_unicode=True).encode("utf-8", "replace")


def in_cell(rng: Random, content: bytes) -> bytes:
    """Put something else in the place of a field of a CSV file."""
    lines = content.split(b"\n")
    i = rng.randrange(len(lines))
    cells = lines[i].split(b",")
    cells[rng.randrange(len(cells))] = rng.choice((str(rng.choice(ODD)).encode("utf-8", "replace"), rng.choice(TOKENS)))
    lines[i] = b",".join(cells)
    return b"\n".join(lines)


def in_safetensors_header(rng: Random, content: bytes) -> bytes:
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    told = header.get("__metadata__", {})
    packed = [name for name, text in told.items() if text.startswith("{")]
    if packed and rng.random() < 0.7:  # JSON within JSON: configs, tokenizer
        name = rng.choice(packed)
        told[name] = rng.choice((in_json, *ANY))(rng, told[name].encode()).decode("utf-8", "replace")
    else:
        header = odd_value(rng, header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[end:]


def pickles(rng: Random) -> bytes:
    """Return a pickle that calls something, or asks for much."""
    huge = rng.choice((2**31 - 1, 2**32 - 1, 2**40))
    return rng.choice((
        pickle.dumps(Payload(print, ("run",)), 2), f"c{TRAP}\nrun\n)R.".encode(),
        b"cos\nsystem\n(S'touch escaped'\ntR.", f"(S'x'\ni{TRAP}\nRun\n.".encode(),
        b"\x80\x02ctorch\nload\n(S'../canary.txt'\ntR.",
        b"\x80\x04\x8e" + struct.pack("<Q", huge) + b"x.", b"\x80\x02X" + struct.pack("<I", huge % 2**32) + b"x.",
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + huge.to_bytes(8, "little")[:5] + b"\x85R.",
        b"\x80\x02" + b"(" * 99999, b"\x80\x02h\xff.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\x00(\x8a\x05\xff\xff\xff\xff\x7fKatKatKatR.",
        b"\x80\x02ctorch._utils\n_rebuild_parameter\n(NNNtR.", b"\x80\x02]" + b"]a" * 20000 + b".",
    ))  # fmt: skip


def in_zip(rng: Random, content: bytes) -> bytes:
    """Change a member of a checkpoint and write the checksums anew."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        chosen = next(n for n in names if n.endswith(".pkl")) if rng.random() < 0.7 else rng.choice(names)
        for name in names:
            data = old.read(name)
            if name == chosen:
                kind = rng.randrange(6)
                data = pickles(rng) if kind == 0 else rng.choice(ANY)(rng, data) if kind < 4 else data
                if kind == 4:
                    name = rng.choice((*ESCAPES, "a\0b", "", name * 2))
                elif kind == 5 and rng.random() < 0.5:
                    continue
            new.writestr(name, data, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    return out.getvalue()


def in_tar_header(rng: Random, content: bytes) -> bytes:
    """Change a field of a header and its checksum with it."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        begin = rng.choice([member.offset for member in tar])
    header = bytearray(content[begin : begin + 512])
    at, size = rng.choice(
        ((0, 100), (124, 12), (124, 12), (136, 12), (156, 1), (156, 1), (157, 100), (257, 8), (345, 155))
    )
    come = rng.choice((
        rng.choice(ESCAPES).encode(), rng.choice(TOKENS), b"\x80" + rng.choice((b"", b"\0" * 3)) + rng.choice(SIZES),
        b"\xff" * 12, b"%011o" % rng.choice((0, 1, 511, 512, 10**5, 8**11 - 1)),
        rng.choice(b"0123456789xgLKSDVAZ").to_bytes(),
    ))[:size]  # fmt: skip
    header[at : at + len(come)] = come
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:begin] + bytes(header) + content[begin + 512 :]


def in_png_chunk(rng: Random, content: bytes) -> bytes:
    """Change, double, drop or swap a chunk of a PNG and write the checksums anew."""
    chunks, at = [], 8
    while at + 8 <= len(content):
        size = int.from_bytes(content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += 12 + size
    if not chunks:
        return flip(rng, content)
    i, j, kind = rng.randrange(len(chunks)), rng.randrange(len(chunks)), rng.randrange(6)
    if kind == 0:
        chunks.insert(j, chunks[i])
    elif kind == 1:
        chunks[i], chunks[j] = chunks[j], chunks[i]
    elif kind == 2:
        names = (
            b"tRNS",
            b"gAMA",
            b"iCCP",
            b"zTXt",
            b"iTXt",
            b"tEXt",
            b"acTL",
            b"fcTL",
            b"fdAT",
            b"eXIf",
            b"PLTE",
            b"sRGB",
        )
        chunks.insert(min(1, j), (rng.choice(names), rng.choice((b"", rng.randbytes(9), zlib.compress(b"\0" * 10**6)))))
    elif kind == 3 and chunks[i][0] == b"IDAT":
        chunks[i] = (b"IDAT", zlib.compress(rng.randbytes(rng.choice((0, 9, 5000)))))
    else:
        chunks[i] = (chunks[i][0], rng.choice(ANY)(rng, chunks[i][1]))
    whole = b"".join(len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4) for name, data in chunks)
    return content[:8] + whole


WITHIN: dict[str, Edit] = {
    ".json": in_json, ".jsonl": in_json_line, ".yaml": in_yaml, ".csv": in_cell, ".safetensors": in_safetensors_header,
    ".ckpt": in_zip, ".pt": in_zip, ".bin": in_zip, ".tar": in_tar_header, ".png": in_png_chunk,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- on files


def damaged(rng: Random, name: str, content: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Return a file's bytes with one to three edits; now and then it gives way to a piece of another file."""
    within = WITHIN.get("." + name.rpartition(".")[2].lower())
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if others and rng.random() < 0.05:
            other = rng.choice(list(others))
            content = rng.choice((other, content[: place(rng, content)] + other[place(rng, other) :]))
        elif within is not None and rng.random() < 0.6:
            try:
                content = within(rng, content)
            except Exception:  # an edit before has broken the form
                content = flip(rng, content)
        else:
            content = rng.choice(ANY)(rng, content)
    return content


def damaged_set(rng: Random, files: dict[str, bytes], targets: Sequence[str]) -> dict[str, bytes]:
    """Return a folder's files with one or two of `targets` damaged, gone, empty, or in each other's place."""
    changed = dict(files)
    for name in rng.sample(list(targets), min(len(targets), rng.choice((1, 1, 1, 2)))):
        kind = rng.randrange(24)
        if kind == 0:
            changed.pop(name, None)
        elif kind == 1:
            changed[name] = b""
        elif kind == 2:
            other = rng.choice(list(targets))
            changed[name], changed[other] = files[other], files[name]
        else:
            changed[name] = damaged(rng, name, files[name], [files[other] for other in targets])
    return changed
