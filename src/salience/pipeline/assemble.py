"""The checkpoint folder, put together from the finished blocks."""

import shutil
from dataclasses import asdict
from typing import Any

from salience.blocks.job import Job
from salience.blocks.journal import Journal
from salience.containers import make_writer
from salience.conversion import stored_tensors
from salience.errors import StorageError
from salience.formats import Dense
from salience.modules import embeddings
from salience.reports.report import REPORT_NAME, BlockReport, LinearReport, Report
from salience.writer import disk_errors, to_dtype, write_json


def collect(job: Job, journal: Journal, report: Report) -> None:
    """Fill in a report from the records of the blocks.

    Raises:
        StorageError: one is damaged.
    """
    for index in range(_pieces(job)):
        record = journal.record(index)
        try:
            report.blocks.append(BlockReport(**record["block"]))
            report.linears += [LinearReport(**linear) for linear in record["linears"]]
            report.folds += record["folds"]
        except (KeyError, TypeError) as error:
            raise StorageError(
                f"the record of block {index} in {journal.folder} is damaged ({error}); delete "
                "that folder to start over"
            ) from None
    report.end_to_end = journal.tuning()
    report.summarize()


def assemble(job: Job, journal: Journal, report: Report) -> None:
    """Write the whole checkpoint into the journal's folder `final`.

    The blocks are copied tensor by tensor into shards of the usual size, with what the pass over
    the whole model changed of them in its place; with them go everything
    outside the blocks, all buffers as they are, the config, the tokenizer and the report.

    Raises:
        StorageError: the disk is full or not writable.
    """
    with disk_errors(journal.final):
        if journal.final.exists():
            shutil.rmtree(journal.final)  # of a run that was killed while it wrote
        journal.final.mkdir()
    config = _config(job)
    with disk_errors(journal.final):
        job.source.save_assets(journal.final)
    write_json(journal.final / "config.json", config)
    if job.fmt.config_file is not None:
        write_json(journal.final / job.fmt.config_file, config["quantization_config"])
    writer = make_writer(job.fmt, journal.final, job.source, job.skeleton, job.weights, config)
    for index in range(_pieces(job)):
        job.progress("shard", index, len(job.blocks))
        tuned = journal.tuned(index)
        with journal.block(index) as block:
            for name in block.keys():  # noqa: SIM118 (not a dict)
                writer.add(name, tuned[name] if name in tuned else block.get_tensor(name))
    parameters = {name for name, _ in job.skeleton.named_parameters()}
    buffers = {name for name, _ in job.skeleton.named_buffers()}
    coded = {f"{name}.weight" for name in job.outside}
    outside = journal.tuned(len(job.blocks))
    for name in sorted(job.weights.names()):
        if name in buffers:
            tensor = job.weights.tensor(name)
        elif name in parameters - coded and not name.startswith(f"{job.prefix}."):
            own = outside[name] if name in outside else job.float_tensor(name)
            tensor = to_dtype(own, name, job.dtype)
        else:
            continue
        for stored, part in stored_tensors(job.skeleton, job.weights, name, tensor).items():
            writer.add(stored, part)
    for name in job.parted_heads():
        tied = next(iter(embeddings(job.skeleton)))
        weight = job.float_tensor(f"{tied}.weight")
        writer.add(f"{name}.weight", to_dtype(weight, name, job.dtype))
    writer.write_json(REPORT_NAME, asdict(report))
    writer.finish()


def _pieces(job: Job) -> int:
    return len(job.blocks) + bool(job.outside)


def _config(job: Job) -> dict[str, Any]:
    config = job.source.config_values()
    config.setdefault("architectures", [type(job.skeleton).__name__])
    config.pop("torch_dtype", None)
    config["dtype"] = str(job.dtype).removeprefix("torch.")
    if any(job.is_tied(name) for name in job.outside):
        config["tie_word_embeddings"] = False  # the head has codes of its own now
    if isinstance(job.fmt, Dense):
        return config
    config["quantization_config"] = job.fmt.config(
        job.schemes, job.float_names, job.outside, job.method.act_order
    )
    return config
