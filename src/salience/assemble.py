"""The checkpoint folder, put together from the finished blocks."""

import shutil
from dataclasses import asdict
from typing import Any

from salience.checkpoint import read_json
from salience.conversion import stored_owner, stored_tensors
from salience.engine import to_half
from salience.job import Job
from salience.journal import Journal
from salience.modules import embeddings
from salience.report import REPORT_NAME, BlockReport, LinearReport, Report
from salience.writer import ShardWriter, disk_errors


def collect(job: Job, journal: Journal, report: Report) -> None:
    """Fill in a report from the records of the blocks."""
    for index in range(_pieces(job)):
        record = journal.record(index)
        report.blocks.append(BlockReport(**record["block"]))
        report.linears += [LinearReport(**linear) for linear in record["linears"]]
        report.folds += record["folds"]
    report.summarize()


def assemble(job: Job, journal: Journal, report: Report) -> None:
    """Write the whole checkpoint into the journal's folder `final`.

    The blocks are copied tensor by tensor into shards of the usual size; with them go everything
    outside the blocks, all buffers as they are, the config, the tokenizer and the report.

    Raises:
        StorageError: the disk is full or not writable.
    """
    with disk_errors(journal.final):
        if journal.final.exists():
            shutil.rmtree(journal.final)  # of a run that was killed while it wrote
        journal.final.mkdir()
    writer = ShardWriter(journal.final)
    for index in range(_pieces(job)):
        job.progress("shard", index, len(job.blocks))
        with journal.block(index) as block:
            for name in block.keys():  # noqa: SIM118 (not a dict)
                writer.add(name, block.get_tensor(name))
    parameters = {name for name, _ in job.skeleton.named_parameters()}
    buffers = {name for name, _ in job.skeleton.named_buffers()}
    coded = {f"{name}.weight" for name in job.outside}
    for name in sorted(job.weights.names()):
        if name in buffers:
            tensor = job.weights.tensor(name)
        elif name in parameters - coded and not name.startswith(f"{job.prefix}."):
            tensor = to_half(job.float_tensor(name), name)
        else:
            continue
        for stored, part in stored_tensors(job.skeleton, job.weights, name, tensor).items():
            writer.add(stored, part)
    for name in job.parted_heads():
        tied = next(iter(embeddings(job.skeleton)))
        writer.add(f"{name}.weight", to_half(job.float_tensor(f"{tied}.weight"), name))
    config = _config(job)
    writer.write_json("config.json", config)
    if job.fmt.config_file is not None:
        writer.write_json(job.fmt.config_file, config["quantization_config"])
    writer.write_json(REPORT_NAME, asdict(report))
    with disk_errors(journal.final):
        job.source.save_assets(journal.final)
    writer.finish()


def _pieces(job: Job) -> int:
    return len(job.blocks) + bool(job.outside)


def _config(job: Job) -> dict[str, Any]:
    if job.source.is_gguf:
        config = job.source.config.to_diff_dict()
        config.pop("_name_or_path", None)
    else:
        config = read_json(job.source.path / "config.json")
    config.setdefault("architectures", [type(job.skeleton).__name__])
    config.pop("torch_dtype", None)
    config["dtype"] = "float16"
    if any(job.is_tied(name) for name in job.outside):
        config["tie_word_embeddings"] = False  # the head has codes of its own now
    # Under the names of the model's modules, and under those other runtimes may go by.
    floats = [*job.kept, *(stored_owner(job.weights, name) for name in job.kept)]
    config["quantization_config"] = job.fmt.config(
        job.schemes, list(dict.fromkeys(floats)), job.outside, job.method.act_order
    )
    return config
