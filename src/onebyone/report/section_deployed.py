"""The section on what a run deploys in int8: each layer's precision, scales and error."""

from __future__ import annotations

from markupsafe import Markup

from onebyone.core.records import RunRecord
from onebyone.report.components import disclosure, paragraph, section, table


def deployed_section(record: RunRecord) -> Markup:
    """Return what each layer computes in; empty for a run in float32."""
    if record.deployed is None:
        return Markup("")
    notes = [paragraph(line) for line in record.deployed.notes()]
    layers = disclosure("Each layer", table(record.deployed.table()))
    distilled = record.deployed.distilled
    if distilled is None:
        return section("deployed", "Deployed in int8", *notes, layers)
    epochs = disclosure("Each epoch of the distillation in int8", table(distilled.log.table()))
    return section("deployed", "Deployed in int8", *notes, layers, epochs)
