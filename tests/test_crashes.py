"""Whatever happens to a run, the same command again goes on to the bit: real processes, interrupted for real."""

from pathlib import Path

import pytest

from crashes import SCENARIOS, STAGES, Crash, Run, interrupted, make_sets, reference, small_disk


@pytest.fixture(scope="session")
def sets(tmp_path_factory) -> Path:
    return make_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="session")
def whole(tmp_path_factory, sets):
    """Give the run of a scenario that nothing interrupted, made once."""
    done: dict[str, Run] = {}

    def run(scenario: str) -> Run:
        if scenario not in done:
            done[scenario] = reference(scenario, tmp_path_factory.mktemp("whole") / scenario, sets)
        return done[scenario]

    return run


def check(scenario: str, crashes: list[Crash], whole, sets: Path, folder: Path, disk: Path | None = None) -> None:
    outcome = interrupted(Run(scenario, folder, sets, disk=disk), whole(scenario), crashes)
    assert outcome.kept, outcome
    assert outcome.crashes == crashes  # all of them happened


# In each of these the run is interrupted once after another, in one life.
LIVES = {
    "written": [
        Crash("SIGKILL", "half written", "autoencoder", 4),
        Crash("SIGTERM", "accumulating", "diffusion", 3),
        Crash("corrupted", "stepped", "diffusion", 5),
    ],
}
LONG_LIVES = {
    **{
        f"{event} in {stage}": [
            Crash(event, "batch", stage, 1),
            Crash(event, "sampling", stage, 4),
            Crash(event, "stepped", stage, 4),
            Crash(event, "end", stage, 6),
        ]
        for event in ("SIGKILL", "SIGTERM", "SIGINT", "exception")
        for stage in STAGES
    },
    **{
        f"validation in {stage}": [
            Crash("SIGKILL", "start", stage, 0),
            Crash("SIGTERM", "stepped", stage, 3),  # its checkpoint is of a step that is still to be validated
            Crash("segfault", "validation", stage, 3),
            Crash("SIGUSR1", "validation", stage, 3),
            Crash("SIGKILL", "gradient", stage, 4),
        ]
        for stage in STAGES
    },
    **{
        f"writing in {stage}": [
            *(Crash("SIGKILL", phase, stage, 2) for phase in ("half written", "not synced")),
            *(Crash("SIGKILL", phase, stage, 4) for phase in ("not renamed", "between renames", "renamed")),
            Crash("corrupted", "stepped", stage, 5),
            Crash("SIGKILL", "exporting", stage, 0),
        ]
        for stage in STAGES
    },
    "caching": [Crash(event, "caching", "diffusion", step) for step, event in enumerate(("SIGKILL", "SIGTERM"))],
}


@pytest.mark.parametrize("crashes", LIVES.values(), ids=list(LIVES))
def test_a_run_survives(crashes, whole, sets, tmp_path):
    check("shapes", crashes, whole, sets, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("crashes", LONG_LIVES.values(), ids=list(LONG_LIVES))
def test_a_run_survives_more(crashes, whole, sets, tmp_path):
    check("shapes", crashes, whole, sets, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", sorted(SCENARIOS.keys() - {"shapes"}))
def test_runs_over_every_kind_of_data_survive(scenario, whole, sets, tmp_path):
    crashes = [Crash("SIGKILL", "stepped", "diffusion", 3), Crash("SIGTERM", "batch", "diffusion", 3)]
    check(scenario, [Crash("SIGKILL", "batch", "autoencoder", 3), *crashes], whole, sets, tmp_path)


@pytest.mark.slow
def test_a_loader_process_that_is_killed_loses_nothing(whole, sets, tmp_path):
    check("workers", [Crash("worker killed", "batch", stage, 3) for stage in STAGES], whole, sets, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["half written", "batch"])
def test_a_full_disk_loses_nothing(phase, whole, sets, tmp_path):
    with small_disk(tmp_path / "disk") as mounted:
        if not mounted:
            pytest.skip("mounting a small disk needs a right that is not there")
        crashes = [Crash("full disk", phase, stage, 3) for stage in ("autoencoder", "diffusion")]
        check("shapes", crashes, whole, sets, tmp_path, tmp_path / "disk")


# What the harness must notice, and by what.
BROKEN = {
    "optimizer": (Crash("SIGKILL", "stepped", "clip", 3), "differing"),
    "position": (Crash("SIGKILL", "stepped", "clip", 3), "differing"),
    "draws": (Crash("SIGKILL", "stepped", "diffusion", 3), "differing"),
    "average": (Crash("SIGKILL", "stepped", "diffusion", 3), "differing"),
    "writing in place": (Crash("SIGKILL", "half written", "clip", 4), "lost"),
}


@pytest.mark.parametrize(
    "what", [name if name == "writing in place" else pytest.param(name, marks=pytest.mark.slow) for name in BROKEN]
)
def test_the_harness_notices_a_broken_promise(what, whole, sets, tmp_path):
    crash, noticed_as = BROKEN[what]
    outcome = interrupted(Run("shapes", tmp_path, sets, sabotage=what), whole("shapes"), [crash])
    assert getattr(outcome, noticed_as), outcome
