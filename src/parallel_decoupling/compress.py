"""One vector of D numbers that keeps what N paths say side by side: their principal directions (ours)."""

import itertools
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.files import atomic_write
from parallel_decoupling.model.pretrained import is_pretrained
from parallel_decoupling.model.run_checkpoint import checkpoint_file, read_checkpoint, seal_checkpoint
from parallel_decoupling.training.module import PDFEmbedder

INPUTS_PER_NUMBER = 4  # training inputs to fit on, per number of a concatenation (ours)


def compress(model: str, output_file: str) -> None:
    """Write a checkpoint whose aggregate has D numbers, but nearly the cosines of all paths side by side.

    It is fitted on the inputs of the run's first training batches and changes nothing but the aggregate.

    Args:
        model: checkpoint or run with several paths, best trained with aggregation concat.
        output_file: the new checkpoint, for every command that takes one; training cannot resume from it.

    Raises:
        ValueError: for an exported folder, a model of one path, or a file that exists.
    """
    if is_pretrained(model):
        raise ValueError(f"{model} is an exported folder; name the run or checkpoint behind it.")
    file = checkpoint_file(model)
    if Path(output_file).exists():
        raise ValueError(f"{output_file} exists; name another file.")
    module = PDFEmbedder.load_from_checkpoint(file, map_location="cpu").eval()
    if module.encoder.num_paths == 1:
        raise ValueError(f"{file} has one path, whose aggregate is that path: there is nothing to compress.")
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    data = MMEBDataModule(**module.trained_data).connect(module)
    data.prepare_data()
    data.setup("fit")
    content = read_checkpoint(file) | {"optimizer_states": [], "lr_schedulers": []}
    content["hyper_parameters"] = {**content["hyper_parameters"], "aggregation": "linear"}
    state: dict[str, Any] = dict(content["state_dict"])
    state.pop("encoder.path_logits", None)
    maps_NDE = principal_maps(gram_matrix(module, data), module.encoder.num_paths)
    content["state_dict"] = {**state, "encoder.path_maps": maps_NDE}
    seal_checkpoint(content)
    with atomic_write(output_file) as unfinished:
        torch.save(content, unfinished)
    sys.stdout.write(f"{output_file}: {maps_NDE.shape[-1]} numbers instead of {maps_NDE[..., 0].numel()}\n")


@torch.inference_mode()
def gram_matrix(module: PDFEmbedder, data: MMEBDataModule) -> Tensor:
    """Return the sum of the outer products ``[N * D, N * D]`` of concatenations of training inputs."""
    size = module.encoder.num_paths * module.encoder.embed_dim
    gram_EE, wanted = torch.zeros(size, size, dtype=torch.float64), INPUTS_PER_NUMBER * size
    batches = itertools.chain.from_iterable(itertools.repeat(data.train_dataloader()))
    with tqdm(total=wanted, desc="training inputs", unit="input") as progress:
        while progress.n < wanted:
            inputs = next(batches).inputs
            for start in range(0, len(inputs), data.eval_batch_size):
                chunk = inputs.select(range(start, min(start + data.eval_batch_size, len(inputs))))
                paths_BND = module.encoder(chunk.to(module.device)).double().cpu()
                rows_BE = F.normalize(paths_BND.flatten(1), dim=-1)
                gram_EE += rows_BE.T @ rows_BE
            progress.update(len(inputs))
    return gram_EE


def principal_maps(gram_EE: Tensor, num_paths: int) -> Tensor:
    """Return a map ``[D, D]`` for each of N paths; their sum is the concatenation's first D directions.

    Relations:
        Summed over paths, ``path_n @ map_n`` equals ``concat @ V`` with the D eigenvectors V of ``gram_EE``
        of the largest eigenvalues, in that order: uncentred principal components. The first coordinates are
        therefore the best ones to keep (``truncate_dim``).
    """
    directions: Tensor = torch.linalg.eigh(gram_EE).eigenvectors.flip(-1)
    dim = len(gram_EE) // num_paths
    return directions[:, :dim].reshape(num_paths, dim, dim).float().contiguous()
