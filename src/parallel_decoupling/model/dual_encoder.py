"""DualEncoder: an OpenCLIP model (a text and an image tower) behind the interface of ``ParallelEncoder``.

The baseline without a multimodal LLM: one path, no prefix. Here: both towers and their fusion. Elsewhere:
loading and tokenising (``dual_backbone``), training and scores, which do not know which encoder they have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, EncoderInputs
from parallel_decoupling.model.dual_backbone import DualBackbone


class DualEncoder(nn.Module):
    """One unit-norm embedding of each input from an OpenCLIP model.

    ``normalize(t + normalize(mean of v))`` with the unit-norm embeddings ``t`` of the text and ``v`` of every
    image; what a row does not have is left out. The score of two inputs is then proportional to the sum of
    the cosines between their parts: score-level fusion as in UniIR's CLIP_SF (which adds embeddings of any
    norm; giving text and image the same weight is ours).

    Args:
        backbone: from ``load_dual_backbone``.

    Relations:
        A text is open_clip's ``encode_text`` and an image without text its ``encode_image``, normalised.
    """

    num_paths = 1
    prefix_layers = 0

    def __init__(self, backbone: DualBackbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.embed_dim: int = backbone.config.model["embed_dim"]
        self.aggregate_dim: int = self.embed_dim
        self.processor: Any = backbone.processor
        self.image_token = IMAGE_PLACEHOLDER  # the processor takes it out
        self._text_counts = torch.zeros(2, dtype=torch.int64)

    def prefix_parameters(self) -> Iterator[nn.Parameter]:
        """None: there is no prefix."""
        return iter(())

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        """Trainable weights: those of both towers, or none."""
        return (parameter for parameter in self.backbone.parameters() if parameter.requires_grad)

    def aggregation_parameters(self) -> Iterator[nn.Parameter]:
        """None: there is one path."""
        return iter(())

    def train(self, mode: bool = True) -> DualEncoder:
        """Set the mode; batch normalisation keeps its pretrained statistics, which no checkpoint holds."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, inputs: EncoderInputs, paths: Sequence[int] | None = None) -> Tensor:
        """Embed the inputs.

        Args:
            inputs: ``B`` rows of ``DualProcessor``.
            paths: None or ``[0]``.

        Returns:
            ``[B, 1, D]`` fp32, unit norm.

        Raises:
            ValueError: for other paths.
        """
        if paths is not None and list(paths) != [0]:
            raise ValueError(f"a dual encoder has path 0 only, got paths {list(paths)}")
        if torch.is_grad_enabled() or not self.training:  # GradCache has a pass without gradient before
            self._count_texts(inputs)
        ids_BL = inputs.tokens["input_ids"]
        sum_BD = torch.zeros(len(inputs), self.embed_dim, device=ids_BL.device)
        with_text = inputs.tokens["attention_mask"].any(dim=1).nonzero()[:, 0]
        if len(with_text):
            text = self.backbone.base.encode_text(ids_BL[with_text])
            sum_BD = sum_BD.index_add(0, with_text, F.normalize(text.float(), dim=-1))
        with_images = [row for row, vision in enumerate(inputs.vision) if vision]
        if with_images:
            pixels = [inputs.vision[row]["pixel_values"] for row in with_images]
            images = self.backbone.base.encode_image(torch.cat(pixels).to(self.backbone.input_dtype))
            by_row = torch.split(F.normalize(images.float(), dim=-1), [len(each) for each in pixels])
            means = torch.stack([each.mean(dim=0) for each in by_row])
            places = torch.tensor(with_images, device=ids_BL.device)
            sum_BD = sum_BD.index_add(0, places, F.normalize(means, dim=-1))
        return F.normalize(sum_BD, dim=-1).unsqueeze(1)

    def aggregate(self, embeddings: Tensor) -> Tensor:
        """Return the one path: ``[B, 1, D]`` to ``[B, D]``."""
        return F.normalize(embeddings.float().mean(dim=1), dim=-1)

    def take_text_counts(self) -> Tensor:
        """Texts embedded since the last call, and those of them that were cut: ``[2]`` int64 on the CPU."""
        counts, self._text_counts = self._text_counts, torch.zeros(2, dtype=torch.int64)
        return counts.cpu()

    @torch.no_grad()
    def _count_texts(self, inputs: EncoderInputs) -> None:
        texts, cut = (inputs.tokens[key].any(dim=1).sum() for key in ("attention_mask", "truncated"))
        self._text_counts = self._text_counts.to(texts.device) + torch.stack((texts, cut))
