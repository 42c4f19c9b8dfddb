"""torchvision's detectors up to their raw outputs, so that they are planned like other networks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from onebyone.core.errors import OptionError

# Parts with layers of detectors of one and of two stages.
_ONE_STAGE = ("backbone", "head")
_TWO_STAGES = ("backbone", "rpn", "roi_heads")
# The smallest box in pixels that a detector of two stages is shown.
_SMALLEST_BOX = 16.0


class RawDetector(nn.Module):
    """A detector from a batch of prepared images to its raw outputs.

    A detector decodes boxes, suppresses overlapping ones, and gives lists of different lengths.
    This module stops before that. The shapes of its outputs do not depend on what is in an image,
    so it can be profiled, planned, rewritten and distilled like any network. :meth:`detector` puts
    the rewritten layers back into a whole detector.

    Detectors of two stages (Faster, Mask and Keypoint R-CNN) classify the boxes that their first
    stage proposes. Here the second stage gets boxes that are the same for every image, spread over
    places and sizes, so that its outputs can be compared too.

    Args:
        detector: torchvision's RetinaNet, FCOS, SSD, SSDLite, Faster, Mask or Keypoint R-CNN, or a
            subclass. It is copied, and never modified.
        proposals: Boxes for each image in the second stage; ``None``: as many as the detector's
            first stage gives at most, so that times are those of a full image. Without effect for
            others.

    Raises:
        OptionError: If the module is no such detector.

    Examples:
        >>> from torchvision.models.detection import ssdlite320_mobilenet_v3_large
        >>> detector = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
        >>> raw = RawDetector(detector.eval())
        >>> outputs = raw(raw.prepared([torch.rand(3, 240, 320)]))
        >>> {name: tuple(tensor.shape) for name, tensor in outputs.items()}
        {'bbox_regression': (1, 3234, 4), 'cls_logits': (1, 3234, 91)}
    """

    def __init__(self, detector: nn.Module, *, proposals: int | None = None) -> None:
        super().__init__()
        names = _parts(detector)
        if proposals is not None and (isinstance(proposals, bool) or proposals < 1):
            raise OptionError(f"`proposals` must be at least 1, got {proposals}.")
        shell: Any = copy.deepcopy(detector).eval()
        if proposals is None and names == _TWO_STAGES:
            proposals = int(shell.rpn.post_nms_top_n())
        for name in names:
            self.add_module(name, shell.get_submodule(name))
            setattr(shell, name, nn.Identity())
        # In a tuple, so that its transform and its rules are no part of this network.
        self._shell = (shell,)
        self._boxes = proposals or 0
        self.train(detector.training)

    def prepared(self, images: Sequence[Tensor]) -> Tensor:
        """Return images as the detector makes them for its layers: normalized, resized, padded.

        Args:
            images: Each of shape ``(3, height, width)``, float, between 0 and 1, of any sizes; not
                modified.

        Returns:
            One batch ``(n, 3, height, width)``. A detector that scales by the shorter side gives a
            size that depends on the images; all batches of one data set must have the same.
        """
        wrong = [each for each in images if each.ndim != 3 or not each.is_floating_point()]
        if wrong or not len(images):
            came = f"{tuple(wrong[0].shape)} of {wrong[0].dtype}" if wrong else "none"
            raise OptionError(
                f"Images must be float tensors of shape (3, height, width), got {came}."
            )
        with torch.no_grad():
            batch, _ = self._whole.transform(list(images))
        tensors: Tensor = batch.tensors
        return tensors

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the raw outputs for prepared images, each with the batch first."""
        parts: Any = self
        features = parts.backbone(images)
        if isinstance(features, Tensor):
            features = {"0": features}
        if hasattr(self, "head"):
            raw: dict[str, Tensor] = parts.head(list(features.values()))
            return raw
        return self._two_stages(images, features)

    def _two_stages(self, images: Tensor, features: dict[str, Tensor]) -> dict[str, Tensor]:
        parts: Any = self
        objectness, deltas = parts.rpn.head(list(features.values()))
        outputs = {f"rpn_objectness.{place}": each for place, each in enumerate(objectness)}
        outputs |= {f"rpn_deltas.{place}": each for place, each in enumerate(deltas)}
        size = (int(images.shape[-2]), int(images.shape[-1]))
        count = self._boxes
        boxes = [spread_boxes(count, size).to(images)] * len(images)
        sizes = [size] * len(images)
        heads = parts.roi_heads
        found = heads.box_head(heads.box_roi_pool(features, boxes, sizes))
        scores, moves = heads.box_predictor(found)
        found_by_name = {"box_scores": scores, "box_deltas": moves}
        for kind in ("mask", "keypoint"):
            if getattr(heads, f"has_{kind}")():
                inside = getattr(heads, f"{kind}_roi_pool")(features, boxes, sizes)
                inside = getattr(heads, f"{kind}_head")(inside)
                found_by_name[f"{kind}s"] = getattr(heads, f"{kind}_predictor")(inside)
        for name, each in found_by_name.items():
            outputs[name] = each.reshape(len(images), count, *each.shape[1:])
        return outputs

    def detector(self) -> nn.Module:
        """Return a whole detector with copies of this module's layers, in the same mode."""
        whole: nn.Module = copy.deepcopy(self._whole)
        for name, part in self.named_children():
            setattr(whole, name, copy.deepcopy(part))
        return whole.train(self.training)

    @property
    def _whole(self) -> Any:
        return self._shell[0]


def spread_boxes(count: int, size: tuple[int, int]) -> Tensor:
    """Return boxes of many sizes all over an image, always the same ones.

    Args:
        count: How many.
        size: Height and width of the image in pixels.

    Returns:
        Left, top, right and bottom in pixels; shape ``(count, 4)``.
    """
    sequence: Any = torch.quasirandom.SobolEngine
    draws = sequence(4).draw(count).double()
    extent = torch.tensor([size[1], size[0]], dtype=torch.float64)
    smallest = torch.minimum(torch.full_like(extent, _SMALLEST_BOX), extent)
    sides = smallest * (extent / smallest) ** draws[:, 2:]
    corner = (extent - sides) * draws[:, :2]
    return torch.cat([corner, corner + sides], dim=1)


def _parts(detector: nn.Module) -> tuple[str, ...]:
    """Return the names of a detector's children that have layers."""
    # Late: torchvision takes a second to import, and few networks are detectors.
    from torchvision.models import detection  # noqa: PLC0415
    from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN  # noqa: PLC0415

    if isinstance(detector, (detection.RetinaNet, detection.FCOS, detection.ssd.SSD)):
        return _ONE_STAGE
    if isinstance(detector, GeneralizedRCNN):
        return _TWO_STAGES
    raise OptionError(
        "`detector` must be torchvision's RetinaNet, FCOS, SSD, SSDLite or an R-CNN, got "
        f"{type(detector).__name__}. Of another detector, write a module that shares its layers "
        "and gives its outputs before boxes are decoded."
    )
