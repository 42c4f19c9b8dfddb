"""torchvision's detectors up to their raw outputs, so that they are planned like other networks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onebyone.core.average_precision import Detections, MeanAveragePrecision
from onebyone.core.detector_measure import RawDetections
from onebyone.core.errors import OptionError
from onebyone.core.task import Task
from onebyone.core.tensor_trees import tensors_in

# Parts with layers of detectors of one and of two stages.
_ONE_STAGE = ("backbone", "head")
_TWO_STAGES = ("backbone", "rpn", "roi_heads")
# The smallest box in pixels that a detector of two stages is shown.
_SMALLEST_BOX = 16.0
# What torchvision calls the raw outputs of a detector of one stage.
_KINDS = {"cls_logits": "classes", "bbox_regression": "boxes", "bbox_ctrness": "quality"}
# Height and width of an image that shows which outputs there are, where any size will do.
_ANY_SIZE = (128, 128)


@dataclass(frozen=True)
class _Decoder:
    """Decodes the raw outputs of a detector of one stage for images of one size.

    Attributes:
        shell: The detector without its layers.
        inside: Height and width in pixels that boxes are clipped to: of the images unpadded.
        anchors: Boxes that outputs are relative to, ``(anchors, 4)``.
        levels: The number of anchors of each map of features; not used for SSD, whose maps differ
            in the number of anchors at a position.
        outputs: Name and last size of each output, in order.
        one_class_each: Whether each anchor has one class or none (SSD): a softmax gives the
            probabilities.
    """

    shell: Any
    inside: tuple[int, int]
    anchors: Tensor
    levels: tuple[int, ...]
    outputs: tuple[tuple[str, int], ...]
    one_class_each: bool

    @torch.no_grad()
    def decode(self, outputs: Mapping[str, Tensor]) -> list[Detections]:
        """Return the boxes of each image; see :meth:`RawDetector.decode`."""
        raw: dict[str, Any] = {name: each.float() for name, each in outputs.items()}
        first = next(iter(raw.values()))
        sizes, anchors = [self.inside] * len(first), self.anchors.to(first.device)
        each_image: Any = [anchors] * len(first)
        if not self.one_class_each:
            levels = list(self.levels)
            raw = {name: list(torch.split(each, levels, dim=1)) for name, each in raw.items()}
            each_image = [list(torch.split(anchors, levels))] * len(first)
        found: list[Detections] = self.shell.postprocess_detections(raw, each_image, sizes)
        return found


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
        size: Height and width in pixels of the prepared images, which :meth:`decode` needs. The
            default is the detector's own where it is fixed (SSD), else that of the last
            :meth:`prepared`.

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

    def __init__(
        self,
        detector: nn.Module,
        *,
        proposals: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
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
        fixed = getattr(shell.transform, "fixed_size", None)  # width and height
        self._size = size if size is not None or fixed is None else (fixed[1], fixed[0])
        self._inside: tuple[int, int] | None = None  # without what pads the images
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
        self._size = (int(tensors.shape[-2]), int(tensors.shape[-1]))
        inside = set(batch.image_sizes)
        self._inside = next(iter(inside)) if len(inside) == 1 else None
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

    @property
    def task(self) -> Task | None:
        """The task of a detector of one stage: its divergence, and mAP as its metric.

        Functions of onebyone use it where no task is given. ``None`` for a detector of two stages,
        whose raw outputs can be compared but not decoded.
        """
        if not hasattr(self, "head"):
            return None
        decoder = self._decoder(self._size or _ANY_SIZE)
        if {name for name, _ in decoder.outputs} - _KINDS.keys():
            return None  # a head of the user's own
        order = tuple((_KINDS[name], values) for name, values in decoder.outputs)
        measure = RawDetections(order, exclusive=decoder.one_class_each)
        decode = self.decode if self._size is None else decoder.decode
        return Task("detection", measure, metric=MeanAveragePrecision(decode))

    def decode(self, outputs: Mapping[str, Tensor]) -> list[Detections]:
        """Return the boxes that raw outputs mean, as the whole detector finds them.

        Args:
            outputs: What this network, or a rewritten one, gave for ``n`` images.

        Returns:
            A mapping for each image: ``boxes`` ``(k, 4)`` as left, top, right and bottom in pixels
            of the prepared image, ``scores`` and ``labels`` ``(k,)``.

        Raises:
            OptionError: If the detector has two stages, or the size of its images is not known.
        """
        if not hasattr(self, "head"):
            raise OptionError(
                "Only the raw outputs of a detector of one stage can be decoded, got those of "
                f"{type(self._whole).__name__}, whose second stage was shown other boxes. Run "
                "`detector()` instead."
            )
        if self._size is None:
            raise OptionError(
                "The size of the images must be known to decode boxes, got none: give `size` to "
                "RawDetector, or make the images by its `prepared`."
            )
        return self._decoder(self._size).decode(outputs)

    @torch.no_grad()
    def _decoder(self, size: tuple[int, int]) -> _Decoder:
        """Return what decodes outputs for images of a size, found by one run of a copy."""
        # Late: see _parts.
        from torchvision.models.detection.image_list import ImageList  # noqa: PLC0415
        from torchvision.models.detection.ssd import SSD  # noqa: PLC0415

        parts: Any = copy.deepcopy(self).eval()
        weight = next(self.parameters())
        images = torch.zeros(1, 3, *size, device=weight.device, dtype=weight.dtype)
        features = parts.backbone(images)
        maps = [features] if isinstance(features, Tensor) else list(features.values())
        raw = parts.head(maps)
        (anchors,) = self._whole.anchor_generator(ImageList(images, [size]), maps)
        cells = [each.shape[-2] * each.shape[-1] for each in maps]
        shapes = {id(each): (name, int(each.shape[-1])) for name, each in raw.items()}
        return _Decoder(
            shell=self._whole,
            inside=self._inside or size,
            anchors=anchors.float(),
            levels=tuple(len(anchors) // sum(cells) * each for each in cells),
            outputs=tuple(shapes[id(each)] for each in tensors_in(raw)),
            one_class_each=isinstance(self._whole, SSD),
        )

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
