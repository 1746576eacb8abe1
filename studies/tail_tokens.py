"""The rival of parallel paths: N trained tokens at the end of one pass, N embeddings for the price of one.

``python -m studies.tail_tokens`` trains and scores it at the settings of one path in study 12 (rank 24, 600
steps, 600 rows), in about ten minutes of a thread. Ours, after MetaEmbed (arXiv 2509.18095), which compares
such tokens late; here they are contrasted one by one and side by side, as paths are.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn

from parallel_decoupling.batch import EncoderInputs
from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.evaluation.run import Scoring
from parallel_decoupling.model.backbone import Backbone
from parallel_decoupling.model.encoder import ParallelEncoder, check_paths, joined_vision
from parallel_decoupling.training.module import PDFEmbedder

CONFIG = "lightning_configs/demo.yaml"
RATES = {"learning_rate": 3.0e-3, "prefix_learning_rate": 0.1}


class TailTokenEncoder(ParallelEncoder):
    """N unit-norm embeddings of each input from N trained tokens that follow its last one.

    Relations:
        It equals the stock backbone on [token embeddings; tail], whose last N states it returns.
    """

    def __init__(self, backbone: Backbone, num_tokens: int, seed: int) -> None:
        super().__init__(backbone, num_paths=1, prefix_length=0, aggregation="concat", seed=seed)
        self.num_paths, self.aggregate_dim = num_tokens, num_tokens * self.embed_dim
        scale = backbone.language_model.get_input_embeddings().weight.std()
        draw = torch.Generator().manual_seed(seed)
        self.tail = nn.Parameter(scale * torch.randn(num_tokens, self.embed_dim, generator=draw))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return what trains; the tail has the rate of prefixes."""
        return {**super().parameter_groups(), "prefixes": [self.tail]}

    def forward(self, inputs: EncoderInputs, paths: Any = None) -> Tensor:
        """Embed ``B`` tokenised rows by the wanted tokens: ``[B, N', D]`` fp32, unit norm."""
        chosen, count = check_paths(paths, self.num_paths), self.num_paths
        tokens = {
            name: F.pad(value, (0, count), value=int(name == "attention_mask"))
            for name, value in inputs.tokens.items()
        }

        def write_tail(module: nn.Module, args: Any, embedded_BLD: Tensor) -> Tensor:
            tail_BND = self.tail.to(embedded_BLD.dtype).expand(len(embedded_BLD), -1, -1)
            return torch.cat((embedded_BLD[:, :-count], tail_BND), dim=1)

        handle = self.backbone.language_model.get_input_embeddings().register_forward_hook(write_tail)
        try:
            states_BLD = self.backbone(tokens, joined_vision(inputs.vision))
        finally:
            handle.remove()
        return F.normalize(states_BLD[:, -count:][:, chosen].float(), dim=-1)


def embedder(model: dict[str, Any], num_tokens: int) -> PDFEmbedder:
    """Return the training module of a demo's settings with tail tokens in place of paths."""
    paths = {"num_paths": num_tokens, "aggregation": "concat", "mi": {"kind": "none"}, "mi_weight": 0.0}
    module = PDFEmbedder(**{**model, **paths})
    module.encoder = TailTokenEncoder(module.encoder.backbone, num_tokens, model["seed"])  # type: ignore[arg-type]
    return module


def main() -> None:
    """Train, test and print the scores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/studies/tail_tokens"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    with open(CONFIG) as file:
        config = yaml.safe_load(file)
    adapter = {"kind": "lora", "rank": 24, "alpha": 48}
    model = {**config["model"], "seed": args.seed, "adapter": adapter}
    model["optimizer"] = {**model["optimizer"], **RATES}
    seed_everything(args.seed)
    module = embedder(model, args.tokens)
    tasks = ["overall", "several_answers"]
    data = MMEBDataModule(**{**config["data"], "seed": args.seed, "eval_tasks": tasks})
    data.connect(module)
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False}
    options |= {"default_root_dir": str(args.output_dir), "enable_checkpointing": False}
    Trainer(max_steps=args.steps, **options).fit(module, data)
    Trainer(callbacks=[Scoring(data)], **options).test(module, data)


if __name__ == "__main__":
    main()
