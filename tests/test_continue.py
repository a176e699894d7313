"""Kill, full disk, another option: the same command goes on, any other is told what differs."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig

from salience.blocks.journal import Journal
from salience.methods import EndToEnd
from tiny_models import TEXT, VOCABULARY, llama_config, make_model, save
from workshop import Run, Workshop, differences, finished_blocks, published_blocks

QUICK = ("--scheme", "w4g32", "--samples", "2", "--seqlen", "16", "--device", "cpu")
JOBS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "awq": ("llama", ("--save-search", "found"), {}),
    "shards": ("llama", ("--method", "rtn"), {"shard_bytes": 20_000}),
    "on disk": ("llama", ("--effort", "balanced"), {"on_disk": True}),
    "saved": (
        "two kinds",
        ("--effort", "balanced", "--format", "compressed-tensors", "--rule", "lm_head=w8g32"),
        {"save_seconds": 0},
    ),
    "best": ("llama", ("--effort", "best", "--samples", "3"), {"save_seconds": 0, "iterations": 4}),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and a text, in which every job has a folder of its own."""
    place = tmp_path_factory.mktemp("place")
    save(make_model(llama_config(num_hidden_layers=2)), place / "llama")
    # A dense block, then two with experts.
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        mlp_only_layers=[0],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        eos_token_id=0,
        bos_token_id=None,
    )
    save(make_model(config), place / "two kinds")
    (place / "text.txt").write_text(TEXT[:20_000])
    return place


class Job:
    """One command in a folder of its own."""

    def __init__(self, workshop: Workshop, folder: Path, name: str) -> None:
        model, options, self.how = JOBS[name]
        self.args = ("quantize", f"../{model}", "-o", "out", *QUICK, *options)
        self.args += ("--calibration", "../text.txt")
        self.workshop, self.folder = workshop, folder
        self.out, self.partial = folder / "out", folder / "out.partial"
        folder.mkdir()

    def run(self, *more: str, **how: Any) -> Run:
        return self.workshop(*self.args, *more, cwd=self.folder, **self.how, **how)

    def state(self) -> dict[str, tuple[int, int]]:
        """Every file in the folder, with inode and time; a lock is no state."""
        files = (path for path in self.folder.rglob("*") if path.name != "lock")
        return {
            str(path.relative_to(self.folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
            for path in files
            if path.is_file()
        }


@pytest.fixture(scope="module")
def whole(workshop: Workshop, place: Path) -> dict[str, tuple[Job, Run]]:
    """Each job, not interrupted."""
    found = {}
    for name in JOBS:
        job = Job(workshop, place / f"whole {name}", name)
        found[name] = (job, job.run())
        assert found[name][1].status == 0, found[name][1]
    return found


def finish(job: Job, whole: Job, name: str = "") -> Run:
    """Go on: no finished block is done again, and the result is that of the whole job."""
    done = finished_blocks(job.partial)
    published = (job.partial / "published").exists()
    ended = (job.out / "config.json").exists() and not published
    run = job.run()
    if ended:  # killed when nothing but an empty folder was left to delete
        assert "exists and is not an empty folder" in run.line
    else:
        assert run.status == 0, run
    if not published and not ended:
        after = published_blocks(run)
        assert done.items() <= after.items(), name
        assert after, run
    assert differences(job.out, whole.out) == [], name
    assert {path.name for path in job.folder.iterdir()} == {p.name for p in whole.folder.iterdir()}
    if (whole.folder / "found").exists():
        assert (job.folder / "found").read_bytes() == (whole.folder / "found").read_bytes()
    return run


def test_runs_are_the_same(workshop: Workshop, whole: Any, tmp_path: Path, place: Path) -> None:
    for name, (first, run) in whole.items():
        assert len(published_blocks(run)) >= 2 * 2
        names = {path.name for path in first.folder.iterdir()}
        assert names == ({"out", "found"} if name == "awq" else {"out"})
    assert len(list((whole["shards"][0].out).glob("model-*.safetensors"))) > 2
    for name, mark in (("on disk", "hidden-00001.bin.growing"), ("saved", ".hidden-00001.bin.tmp")):
        assert any(mark in change for change in whole[name][1].changes), name


@pytest.mark.parametrize("name", JOBS)
def test_one_kill(workshop: Workshop, whole: Any, place: Path, name: str) -> None:
    """Before the record of the last block is there."""
    first, run = whole[name]
    changes = [line for line in run.changes if not line.startswith("kept ")]
    rename = [i for i, line in enumerate(changes) if line.startswith("os.rename")]
    records = [i for i in rename if changes[i].endswith(".json") and "block-" in changes[i]]
    job = Job(workshop, place / f"one kill {name}", name)
    assert job.run(kill_at=records[-1] + 1).status == -9
    assert len(finished_blocks(job.partial)) == 2 * (len(records) - 1)
    again = finish(job, first)
    saved = [change for change in again.changes if "os.rename" in change and "block-" in change]
    assert len(saved) == 2  # the last block's two files


def test_kills_while_tuning(workshop: Workshop, whole: Any, place: Path) -> None:
    """With no state yet, in the middle, among what was tuned, and before its record."""
    first, run = whole["best"]
    changes = [line for line in run.changes if not line.startswith("kept ")]

    def renames(mark: str) -> list[int]:
        return [
            n for n, line in enumerate(changes, 1) if line.startswith("os.rename") and mark in line
        ]

    states, tuned, record = renames("tuning.saf"), renames("tuned-0"), renames("tuned.json")
    total = 2 * EndToEnd().passes
    assert len(states) == total and len(tuned) == 3 and len(record) == 1
    points = (states[0], states[3] + 1, tuned[1], record[0], record[0] + 1)
    for i, (n, left) in enumerate(zip(points, (total, total - 4, 0, 0, 0), strict=True)):
        job = Job(workshop, place / f"tuning {i}", "best")
        assert job.run(kill_at=n).status == -9
        again = finish(job, first, changes[n - 1])
        saved = [c for c in again.changes if c.startswith("os.rename") and "tuning.saf" in c]
        assert len(saved) == left, changes[n - 1]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "tear", "step"),
    [
        ("awq", False, 3),
        ("awq", True, 2),
        ("shards", True, 5),
        ("on disk", False, 5),
        ("saved", False, 5),
        ("best", False, 6),
    ],
)
def test_kill_at_every_change(
    workshop: Workshop, whole: Any, place: Path, name: str, tear: bool, step: int
) -> None:
    """Before one in three changes of the disk, and in the middle of every other write; of what
    differs from the plain job only here and there, one in five. All of them took minutes, which
    `benchmarks/kill_and_continue.py` has.
    """
    first, run = whole[name]
    changes = [line for line in run.changes if not line.startswith("kept ")]
    points = [n for n, line in enumerate(changes, 1) if not tear or line.startswith("open ")]
    assert len(points) > (20 if tear else 40)
    for n in points[::step]:
        job = Job(workshop, place / f"{name} {tear} {n}", name)
        assert job.run(kill_at=n, tear=tear).status == -9, changes[n - 1]
        finish(job, first, changes[n - 1])
        shutil.rmtree(job.folder)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "step"), [("awq", 11), ("saved", 9)])
def test_many_kills(workshop: Workshop, whole: Any, place: Path, name: str, step: int) -> None:
    """Every few changes, so that one job is killed many times; sooner where nothing would move."""
    job = Job(workshop, place / f"many {name} {step}", name)
    kills, distance = 0, step
    while True:
        before = finished_blocks(job.partial)
        if (run := job.run(kill_at=distance)).status == 0 or job.out.exists():
            break
        assert run.status == -9, run
        after = finished_blocks(job.partial)
        assert before.items() <= after.items()
        kills += 1
        distance = step if len(after) > len(before) else distance + step
    assert kills > 2
    if run.status:
        finish(job, whole[name][0])
    assert differences(job.out, whole[name][0].out) == []


@pytest.mark.slow
def test_kills_at_random(place: Path, tmp_path: Path) -> None:
    """The benchmark, with few kills."""
    script = Path(__file__).parent.parent / "benchmarks" / "kill_and_continue.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, script, "--kills", "10", "--seed", "1", "-o", tmp_path / "out.json"],
        check=True,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    summary = json.loads(done.stdout)
    assert summary == json.loads((tmp_path / "out.json").read_text())
    assert summary["kills"] == 10 and summary["jobs"] >= 1
    assert summary["blocks_done_twice"] == 0 and summary["identical"] == summary["jobs"]


# Another command is refused, names what differs, and changes nothing.

OTHERS: dict[str, tuple[Sequence[str], str]] = {
    "scheme": (("--scheme", "w4g16"), r"--scheme w4g32, now it is w4g16"),
    "method": (("--method", "rtn"), "--method awq, now it is rtn"),
    "effort": (("--effort", "balanced"), "--effort fast, now it is balanced"),
    "format": (("--format", "compressed-tensors"), "--format awq, now it is compressed-tensors"),
    "seed": (("--seed", "1"), "--seed 0, now it is 1"),
    "samples": (("--samples", "3"), "--samples 2, now it is 3"),
    "seqlen": (("--seqlen", "17"), "--seqlen 16, now it is 17"),
    "text": (("--calibration", "pydoc"), "--calibration ../text.txt, now it is pydoc"),
    "rule": (("--rule", "q_proj=w4g32"), r"--rules \[\], now it is \[\['q_proj', 'w4g32'\]\]"),
    "skip": (("--skip", "q_proj"), r"--skip \[\], now it is \['q_proj'\]"),
    "only": (("--only", "q_proj"), r"--only \[\], now it is \['q_proj'\]"),
    "search": (("--save-search", "other"), "--save-search found, now it is other"),
}


def killed(workshop: Workshop, folder: Path, **how: Any) -> Job:
    """A job that was killed after its first block."""
    job = Job(workshop, folder, "awq")
    assert job.run(kill_at=17, **how).status == -9
    assert len(finished_blocks(job.partial)) == 2
    return job


def test_another_option_is_refused(workshop: Workshop, whole: Any, place: Path) -> None:
    job = killed(workshop, place / "options")
    before = job.state()
    for options, message in OTHERS.values():
        line = job.run(*options).line
        assert re.search(rf"out\.partial was begun with {message}; use that, or delete", line), line
        assert job.state() == before
    finish(job, whole["awq"][0])


def test_another_text_is_refused(workshop: Workshop, whole: Any, place: Path) -> None:
    """The same name with other content; what the model does not read of it does not matter."""
    text, right = place / "text.txt", TEXT[:20_000]
    job = killed(workshop, place / "texts")
    before = job.state()
    try:
        text.write_text("0123456789 " * 2000)
        assert "was begun with the calibration tokens" in job.run().line
        assert job.state() == before
    finally:
        text.write_text(right)
    finish(job, whole["awq"][0])


def test_another_model_is_refused(workshop: Workshop, whole: Any, place: Path) -> None:
    model = place / "llama" / "model.safetensors"
    times = model.stat().st_atime_ns, model.stat().st_mtime_ns
    job = killed(workshop, place / "models")
    before = job.state()
    try:
        os.utime(model, ns=(times[0], times[1] + 1))
        assert "was begun with the model's model.safetensors" in job.run().line
        assert job.state() == before
    finally:
        os.utime(model, ns=times)
    finish(job, whole["awq"][0])


def test_another_search_file_is_refused(workshop: Workshop, whole: Any, place: Path) -> None:
    job = Job(workshop, place / "searches", "awq")
    shutil.copy(whole["awq"][0].folder / "found", place / "searches" / "given")
    job.args = ("quantize", "../llama", "-o", "out", "--from-search", "given", "--device", "cpu")
    assert job.run(kill_at=17).status == -9
    os.utime(place / "searches" / "given", ns=(0, 0))
    assert "was begun with the file of --from-search" in job.run().line


def test_another_memory_goes_on(workshop: Workshop, whole: Any, place: Path) -> None:
    """Hidden states on the disk, then in memory, then on the disk again."""
    job = Job(workshop, place / "memory", "on disk")
    for on_disk, step in ((True, 13), (False, 6), (True, 9)):
        job.how = {"on_disk": on_disk, "save_seconds": 0}
        assert job.run("--max-memory", f"{step}GiB", kill_at=step).status == -9
    finish(job, whole["on disk"][0])


def test_two_at_once(workshop: Workshop, whole: Any, place: Path) -> None:
    """The second is refused at once, and the first does not notice."""
    job = killed(workshop, place / "two")
    before = job.state()
    same = json.loads((job.partial / "job.json").read_text())
    with pytest.raises(KeyboardInterrupt), Journal(job.out, same):
        assert "another process is making" in job.run().line
        raise KeyboardInterrupt
    assert job.state() == before
    finish(job, whole["awq"][0])


def test_bad_input_leaves_nothing(workshop: Workshop, place: Path) -> None:
    """A weight of the last block that is not finite is found when all others are done."""
    shutil.copytree(place / "llama", place / "bad model")
    file = place / "bad model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    job = Job(workshop, place / "bad", "awq")
    job.args = tuple("../bad model" if arg == "../llama" else arg for arg in job.args)
    run = job.run()
    assert "model.layers.1.mlp.down_proj.weight" in run.line and "not finite" in run.line
    assert any("block-00000.json" in change for change in run.changes)
    assert list(job.folder.iterdir()) == []
    # A kill in the middle of the clean-up leaves nothing that another model would go on from.
    changes = [line for line in run.changes if not line.startswith("kept ")]
    removals = [n for n, line in enumerate(changes, 1) if line.startswith("os.rem")]
    assert len(removals) > 3
    for n in removals:
        assert job.run(kill_at=n).status == -9
        assert (job.partial / "job.json").exists() or not list(job.partial.glob("block-*"))
        assert job.run().status == 2
        assert list(job.folder.iterdir()) == []


def test_finished_output_is_refused(workshop: Workshop, whole: Any, place: Path) -> None:
    job = whole["awq"][0]
    before = job.state()
    run = job.run()
    assert "out exists and is not an empty folder" in run.line
    assert run.changes == []
    assert job.state() == before


def test_search_file_that_exists(workshop: Workshop, whole: Any, place: Path) -> None:
    """It is refused at the start, and when a job is to go on."""
    job = Job(workshop, place / "exists", "awq")
    (job.folder / "found").write_text("mine")
    run = job.run()
    assert "found exists; name another file" in run.line
    assert run.changes == []
    (job.folder / "found").rename(job.folder / "moved")
    assert job.run(kill_at=17).status == -9
    (job.folder / "moved").rename(job.folder / "found")
    before = job.state()
    assert "found exists; name another file" in job.run().line
    assert job.state() == before
    (job.folder / "found").unlink()
    finish(job, whole["awq"][0])


def test_a_folder_of_that_name_is_left_alone(workshop: Workshop, place: Path) -> None:
    job = Job(workshop, place / "mine", "awq")
    job.partial.mkdir()
    (job.partial / "diary.txt").write_text("mine")
    assert "out.partial exists and was not made by salience" in job.run().line
    assert {path.name for path in job.folder.rglob("*")} == {"out.partial", "diary.txt"}


@pytest.mark.parametrize("name", ["out", "out/found", "out.partial/found", "no/found"])
def test_search_file_in_the_output(workshop: Workshop, place: Path, name: str) -> None:
    job = Job(workshop, place / f"inside {name.replace('/', ' ')}", "awq")
    assert f"{name}" in job.run("--save-search", name).line
    assert list(job.folder.iterdir()) == []


# Disks.


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["on disk"])
def test_full_at_every_change(workshop: Workshop, whole: Any, place: Path, name: str) -> None:
    """From some write on all fail; the same command goes on when they no longer do."""
    first, run = whole[name]
    changes = [line for line in run.changes if not line.startswith("kept ")]
    writes = [n for n, line in enumerate(changes, 1) if line.startswith("open ")]
    for n in writes[::3]:
        job = Job(workshop, place / f"full {name} {n}", name)
        failed = job.run(fail_at=n)
        assert "No space left on device" in failed.line, changes[n - 1]
        finish(job, first, changes[n - 1])
        shutil.rmtree(job.folder)


def mounted(folder: Path, *options: str) -> None:
    """Mount a small disk, where that is allowed."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", *options, "tmpfs", folder], check=False, capture_output=True
    )
    if done.returncode:
        pytest.skip("mounting is not allowed here")


def test_small_disk(workshop: Workshop, whole: Any, place: Path) -> None:
    """Too small from the start; then full in the middle, by another's file."""
    job = Job(workshop, place / "small", "awq")
    mounted(job.folder, "-o", "size=200k")
    try:
        assert "the work needs" in job.run().line
        assert list(job.folder.iterdir()) == []
        subprocess.run(["mount", "-o", "remount,size=8m", job.folder], check=True)
        assert job.run(kill_at=17).status == -9
        done = finished_blocks(job.partial)
        assert len(done) == 2
        filler = job.folder / "filler"
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError):
            while file.write(bytes(4096)):
                pass
        assert "free some or name another output" in job.run().line
        assert finished_blocks(job.partial) == done
        filler.unlink()
        finish(job, whole["awq"][0])
    finally:
        subprocess.run(["umount", job.folder], check=True)


@pytest.mark.slow
def test_disk_that_fills_up(workshop: Workshop, whole: Any, place: Path) -> None:
    """Real full disks of growing size; the check beforehand is out of the way."""
    job = Job(workshop, place / "filling", "awq")
    job.how = {"no_disk_check": True}
    mounted(job.folder, "-o", "size=8k")
    failures = 0
    try:
        for size in range(16, 4000, 24):
            done = finished_blocks(job.partial)
            run = job.run()
            if run.status == 0:
                break
            failures += 1
            assert "No space left on device" in run.line, run
            assert done.items() <= finished_blocks(job.partial).items()
            subprocess.run(["mount", "-o", f"remount,size={size}k", job.folder], check=True)
        assert failures > 5
        assert differences(job.out, whole["awq"][0].out) == []
    finally:
        subprocess.run(["umount", job.folder], check=True)


def test_read_only_folder(workshop: Workshop, whole: Any, place: Path) -> None:
    """To begin with, and for a job that is to go on."""
    job = Job(workshop, place / "read only", "awq")
    if os.geteuid():
        job.folder.chmod(0o555)
    else:  # whom no mode stops
        mounted(job.folder, "-o", "ro")
    try:
        assert "cannot write to" in job.run().line
        if not os.geteuid():
            subprocess.run(["mount", "-o", "remount,rw", job.folder], check=True)
            assert job.run(kill_at=17).status == -9
            before = job.state()
            subprocess.run(["mount", "-o", "remount,ro", job.folder], check=True)
            assert "cannot write to" in job.run().line
            assert job.state() == before
            subprocess.run(["mount", "-o", "remount,rw", job.folder], check=True)
            finish(job, whole["awq"][0])
    finally:
        if os.geteuid():
            job.folder.chmod(0o755)
        else:
            subprocess.run(["umount", job.folder], check=True)
