"""A run's network in int8: quantized, distilled in int8, and written as the files to deploy."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from onebyone.core.errors import OptionError
from onebyone.core.records import Deployed, DeployedLayer, Int8Distillation, Plan
from onebyone.core.settings.runs import ShrinkSettings
from onebyone.data import Data
from onebyone.pipeline.exporting import export
from onebyone.pipeline.run import Run
from onebyone.pipeline.run_folder import DEPLOYED
from onebyone.planning.latency.precision import INT8, runtime_for
from onebyone.quantizing import Quantized, quantize
from onebyone.runtimes.files import FileNetwork
from onebyone.training.int8 import distill_int8

# The file that a runtime reads, and its format.
_FORMATS = {"onnxruntime": ("onnx", "model.onnx"), "openvino": ("openvino", "model.xml")}


def check_runtimes(precision: str, runtimes: Sequence[str]) -> None:
    """Check that a run's runtimes can run the file that is deployed.

    Raises:
        OptionError: If one of them does not run int8, or the first one's file does not run in the
            others.
    """
    if precision != INT8:
        return
    for name in runtimes:
        runtime_for(precision, name)
    if runtimes[0] == "openvino" and len(runtimes) > 1:
        raise OptionError(
            f"With `precision` int8, `openvino` must be the only runtime if it is the first, got "
            f"{', '.join(runtimes)}: its file runs in no other. Name onnxruntime first, whose file "
            "runs in both."
        )


def quantized_in(run: Run, small: nn.Module, chosen: Plan, data: Data) -> Quantized:
    """Quantize a run's network by the closed forms.

    Args:
        run: Whose name and seed are used.
        small: The float network. Not modified.
        chosen: Whose ``float32_layers`` stay float32.
        data: Calibrated on its training inputs.
    """
    return quantize(
        small,
        data.train,
        keep_float32={item.site: item.reason for item in chosen.float32_layers},
        name=run.record.source.name,
        seed=run.settings.seed,
    )


def distilled_in_int8(
    run: Run, quantized: Quantized, teacher: nn.Module, data: Data, settings: ShrinkSettings
) -> tuple[Quantized, Int8Distillation]:
    """Distil a run's network in int8.

    Args:
        run: Whose options of training are used.
        quantized: Not modified.
        teacher: The network to imitate.
        data: Its labels are not used.
        settings: With the number of epochs.
    """
    made = distill_int8(
        quantized,
        data,
        teacher=teacher,
        epochs=settings.int8_epochs,
        mix=settings.mix,
        ignore_index=settings.ignore_index,
        **run.int8_training,
    )
    did = Int8Distillation(
        log=made.log, before=made.before, after=made.after, examples=made.examples
    )
    return made.quantized, did


@contextmanager
def deployed_in_int8(
    run: Run,
    quantized: Quantized,
    chosen: Plan,
    data: Data,
    distilled: Int8Distillation | None = None,
) -> Iterator[FileNetwork]:
    """Write the files of a run's network in int8, and record what each layer computes in.

    Yields the file of the first runtime. Without a folder of the run, the files are removed at the
    end.

    Args:
        run: Its record is added to.
        quantized: Not modified.
        chosen: Written beside the files.
        data: The files are compared on its test inputs.
        distilled: What a distillation in int8 did, for the record.
    """
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside) if run.folder is None else run.folder.file(DEPLOYED)
        record = export(
            quantized,
            folder,
            formats=[_FORMATS[name][0] for name in run.settings.runtimes],
            data=data,
            plan=chosen,
            name=run.record.source.name,
        )
        runtime = run.settings.runtimes[0]
        file = FileNetwork(folder / _FORMATS[runtime][1])
        run.keep(
            deployed=Deployed(
                files=tuple(f"{DEPLOYED}/{name}" for each in record.checks for name in each.files),
                file=f"{DEPLOYED}/{file.path.name}",
                runtime=runtime,
                layers=_layers(quantized),
                file_bytes=file.file_bytes,
                weight_bits=quantized.record.weight_bits,
                instructions=quantized.record.instructions,
                saturates=quantized.record.saturates,
                examples=quantized.record.examples,
                difference=record.checks[0].difference.size,
                distilled=distilled,
            )
        )
        yield file


def _layers(quantized: Quantized) -> tuple[DeployedLayer, ...]:
    return tuple(
        DeployedLayer(
            name=layer.name,
            precision=layer.precision,
            remark=layer.why or layer.equalized,
            error=layer.error,
            largest_scale=max(layer.scales, default=None),
        )
        for layer in quantized.record.layers
    )
