"""PDFEmbedder: the training algorithm of the Parallel Decoupling Framework, as a LightningModule."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from parallel_decoupling.batch import EncoderInputs, LongText, PairBatch, TokenLimit
from parallel_decoupling.distributed import rank, world_size
from parallel_decoupling.model import run_checkpoint
from parallel_decoupling.model.adapters import AdapterConfig
from parallel_decoupling.model.encoder import build_encoder, nested_dims
from parallel_decoupling.model.families import Family
from parallel_decoupling.model.identity import about_encoder, backbone_fingerprint
from parallel_decoupling.model.turns import set_training
from parallel_decoupling.objective.vclub import MutualInformation
from parallel_decoupling.option_types import (
    Dims,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    checked,
)
from parallel_decoupling.training import callbacks, checkpoint, optimization, settings, terms
from parallel_decoupling.training.compute import Progress
from parallel_decoupling.training.grad_cache import Encoding, encode_in_chunks, seeded
from parallel_decoupling.training.optimization import MIConfig, OptimizerConfig
from parallel_decoupling.training.strategies import own_gradients_only, shard_encoder

if TYPE_CHECKING:
    from parallel_decoupling.data.images import ImagePolicy
    from parallel_decoupling.evaluation.embedder import Embedder
    from parallel_decoupling.evaluation.encode import RowBatch

ON_BAR = ("train/loss", "train/hit_at_1_aggregate", "train/path_cosine")  # the progress bar
_ADAPTER, _MI, _OPTIMIZER = AdapterConfig(), MIConfig(), OptimizerConfig()


class PDFEmbedder(LightningModule):
    """N embeddings per input from one multimodal LLM with N prefixes, trained to agree and to differ.

    Parallel Decoupling Framework (arXiv 2511.01588): InfoNCE on every path, InfoNCE on the aggregate, and a
    mutual-information bound between paths whose network q is fitted in an alternating step. Every default
    here is ours; the paper's values are not known.

    ``loss = mean_n info_nce_n + aggregate_weight * info_nce_aggregate + w(step) * mean_pairs mi``, plus
    ``distillation_weight * mean_n KL(aggregate || path n)`` from main step ``distillation_start`` on (ours).

    Args:
        backbone: tiny (shipped), a local folder, a hub id such as Qwen/Qwen2-VL-2B-Instruct, or the baseline
            open_clip:<architecture>/<pretrained tag> (docs/openclip.md).
        num_paths: N, paths per input, 1 or more; at most 8 with prefix_init=meta.
        prefix_length: P, key/value slots per layer and path. With 0 nothing is prepended: one path is
            then the plain backbone, and several need adapter.per_path.
        prefix_layers: first layer with a prefix; the layers below run once for all paths. Or [start, stop],
            stop excluded.
        prefix_type: deep (trained keys and values in every layer) or shallow (trained input embeddings).
        prefix_init: meta (states of short meta-prompts) or random (at the scale of real states).
        aggregation: of the paths' embeddings: mean, concat, learned weights, or a linear map of each.
        adapter: what trains in the backbone.
        mi: the estimator of mutual information and its schedule.
        mi_weight: final weight of the mutual-information term; by default, 0, its estimator only watches.
        aggregate_weight: weight of the aggregate's InfoNCE; 0 switches it off.
        nested_paths: also contrast the aggregates of the first 2 to N - 1 paths, so that fewer may be kept.
        distillation_weight: teaches every path the scores of the aggregate within the batch; 0 is off.
        distillation_start: main steps before that begins.
        matryoshka_dims: from 1 to D, at which paths and aggregate are contrasted, too; terms are means.
        temperature: divides cosines in InfoNCE, above 0.
        learn_temperature: train the temperature, starting from temperature.
        symmetric: also contrast candidates with queries.
        teacher_weight: of the divergence from a teacher's scores within every InfoNCE (docs/data.md).
        false_negative_margin: leaves out, path by path, candidates whose cosine is more than this above the
            positive's; null is off.
        optimizer: rates, schedule, clipping.
        chunk_size: GradCache, rows (queries and candidates) per forward pass; null encodes the batch in one
            graph.
        query_instruction: put before every input of encode_query.
        candidate_instruction: put before every input of encode_document.
        max_tokens: of an input's text and pictures together; null is all positions of the backbone.
        long_text: truncate cuts off the end of a text with more, error refuses it.
        backbone_revision: hub branch, tag or commit.
        dtype: of the backbone's weights; adapters and prefixes are fp32.
        attention: of the language model; flash_attention_2 and flex_attention need a GPU.
        gradient_checkpointing: recompute layers in the backward pass.
        initial_adapter: folder or hub id of a published LoRA or DoRA adapter to continue, with its options.
        quantization: 4bit keeps the frozen weights in four bits (needs bitsandbytes).
        family: names inside a model whose family has no row in docs/backbones.md, and the prompt.
        seed: of everything random in initialisation and training, but not of the data order.

    Raises:
        ValueError: for values out of range, and for options that cannot work together.

    Relations:
        ``num_paths=1, prefix_length=0, mi_weight=0, aggregate_weight=0`` is the single-path VLM2Vec recipe.
        Without dropout, loss and gradients do not depend on the chunk sizes or the number of processes.
    """

    @checked()
    def __init__(
        self,
        backbone: str = "tiny",
        num_paths: PositiveInt = 4,
        prefix_length: NonNegativeInt = 8,
        prefix_layers: NonNegativeInt | Sequence[int] = 0,
        prefix_type: Literal["deep", "shallow"] = "deep",
        prefix_init: Literal["meta", "random"] = "meta",
        aggregation: Literal["mean", "concat", "learned", "linear"] = "mean",
        adapter: AdapterConfig = _ADAPTER,
        mi: MIConfig = _MI,
        mi_weight: NonNegativeFloat = 0.0,
        aggregate_weight: NonNegativeFloat = 1.0,
        nested_paths: bool = False,
        distillation_weight: NonNegativeFloat = 0.0,
        distillation_start: NonNegativeInt = 0,
        matryoshka_dims: Dims | None = None,
        temperature: PositiveFloat = 0.02,
        learn_temperature: bool = False,
        symmetric: bool = False,
        teacher_weight: NonNegativeFloat = 0.0,
        false_negative_margin: NonNegativeFloat | None = None,
        optimizer: OptimizerConfig = _OPTIMIZER,
        chunk_size: PositiveInt | None = None,
        query_instruction: str = "",
        candidate_instruction: str = "",
        max_tokens: PositiveInt | None = None,
        long_text: LongText = "truncate",
        backbone_revision: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa",
        gradient_checkpointing: bool = False,
        initial_adapter: str | None = None,
        quantization: Literal["4bit"] | None = None,
        family: Family | None = None,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        # the frozen backbone is not in the checkpoint; load_into checks every key
        self.strict_loading = False
        self.save_hyperparameters(*inspect.signature(PDFEmbedder).parameters, logger=False)
        typed, plain = settings.read_settings(self.hparams)
        self.save_hyperparameters(plain, logger=False)
        self.mi_config: MIConfig = typed["mi"]
        self.optimizer_config: OptimizerConfig = typed["optimizer"]
        self.query_instruction, self.candidate_instruction = query_instruction, candidate_instruction
        self.progress = Progress()
        self.data_settings: dict[str, Any] = {}
        self.trained_data: dict[str, Any] = {}
        self.encoder = build_encoder(backbone, {**typed, "revision": backbone_revision})
        self.limit = TokenLimit.of(self.encoder.backbone, self.encoder.processor, max_tokens, long_text)
        self.nested_dims = nested_dims(matryoshka_dims, self.encoder.embed_dim)
        sizes = {"embed_dim": self.encoder.embed_dim, "hidden_size": self.mi_config.hidden_size}
        with seeded(torch.device("cpu"), seed, "estimator"):
            self.mutual_information = MutualInformation(self.mi_config.kind, num_paths=num_paths, **sizes)
        log_temperature = torch.tensor(float(temperature)).log()
        self.log_temperature = nn.Parameter(log_temperature) if learn_temperature else None
        self.train()

    def training_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Any]:
        """Take one step: encode, fit q, one gradient of the objective, one step of the embedder.

        Returns ``loss``, ``contrastive`` (scalars) and ``pairs``, all detached, for callbacks.
        """
        given, step = cast(Any, self.hparams), self.progress.steps_done
        with self.encoder.turns.alone(), seeded(self.device, given.seed, step):
            # 1. All paths of all rows, of all ranks. Under GradCache the embeddings are leaves.
            encoding = self._encode(batch.inputs)
            query, candidate = encoding.embeddings.tensor_split([len(batch)])
            pairs = terms.gather_pairs(
                query,
                candidate,
                batch.candidate_ids,
                self.encoder.aggregate,
                self.nested_dims,
                nested_paths=given.nested_paths,
                num_positives=batch.num_positives,
                teacher=batch.teacher,
            )
            # 2. The estimator's own steps, on detached embeddings.
            held_out, nll = self._fit_estimator(pairs)
            values: dict[str, Any] = {"estimator_nll": nll, "estimator_nll_held_out": held_out}
            # 3. The objective, with the estimator frozen.
            weight = self.mi_config.weight_at(step, given.mi_weight)
            path_N, aggregate = terms.contrastive_terms(
                pairs,
                terms.shared(self.temperature),
                symmetric=given.symmetric,
                with_aggregate=given.aggregate_weight > 0,
                teacher_weight=given.teacher_weight,
                false_negative_margin=given.false_negative_margin,
            )
            with terms.frozen(self.mutual_information), torch.set_grad_enabled(weight > 0):
                mi_M = terms.mutual_information_terms(self.mutual_information, pairs)
            mean_mi = mi_M.sum() / max(1, len(mi_M))
            loss = path_N.mean() + given.aggregate_weight * aggregate + weight * mean_mi
            if given.distillation_weight and step >= given.distillation_start:
                distillation = terms.distillation_term(pairs, terms.shared(self.temperature))
                loss = loss + given.distillation_weight * distillation
                values["distillation"] = distillation
            # 4. and 5. Gradient to the embeddings, then through the chunks to the parameters.
            with own_gradients_only(self.trainer.strategy):
                if loss.requires_grad:  # not for texts alone when only vision adapters train
                    self.manual_backward(loss * world_size())
                encoding.backward()
            # 6. The main step; the rest is bookkeeping.
            self._main_step()
        values |= {"loss": loss, "mi": mean_mi, "mi_weight": weight, "contrastive_aggregate": aggregate}
        values["temperature"] = self.temperature
        shown = terms.monitored_values(pairs, values, path_N, mi_M)
        shown |= self.progress.count(batch, self.hparams, self.encoder.backbone.num_layers)
        for name, value in shown.items():
            self.log(name, value, prog_bar=name in ON_BAR)
        return {"loss": loss.detach(), "contrastive": path_N.detach().mean(), "pairs": pairs.detach()}

    @property
    def temperature(self) -> Tensor:
        """Return what divides the cosines, 0-dim."""
        if self.log_temperature is None:
            return torch.tensor(self.hparams["temperature"], device=self.device)
        return self.log_temperature.exp()

    def _encode(self, inputs: EncoderInputs) -> Encoding:
        given = cast(Any, self.hparams)
        seed_parts = (given.seed, self.progress.steps_done, rank(), "encode")
        return encode_in_chunks(self.encoder, inputs, chunk_size=given.chunk_size, seed_parts=seed_parts)

    def _fit_estimator(self, pairs: terms.GatheredPairs) -> tuple[Tensor, Tensor]:
        """Fit q, alike on every rank; return its NLL on this batch before (held out) and after the fit."""
        held_out = nll = torch.zeros((), device=self.device)
        if not self.mutual_information.needs_fit:
            return held_out, nll
        optimizer = cast(Any, self.optimizers())[1].optimizer  # unwrapped: global_step counts main steps only
        for step in range(self.mi_config.fit_steps):
            nll = terms.estimator_nll(self.mutual_information, pairs)
            held_out = nll.detach() if step == 0 else held_out
            optimizer.zero_grad()
            with own_gradients_only(self.trainer.strategy):
                torch.autograd.backward(nll)
            optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            return held_out, terms.estimator_nll(self.mutual_information, pairs)

    def _main_step(self) -> None:
        """Average over ranks, clip, step the embedder and its schedule."""
        optimizers = cast(Any, self.optimizers())
        optimizer = optimizers[0] if isinstance(optimizers, list) else optimizers
        parameters = [parameter for group in self.trainables().values() for parameter in group]
        norm = optimization.finish_gradients(parameters, self.optimizer_config, self.progress.steps_done + 1)
        rates = {f"lr/{group['name']}": group["lr"] for group in optimizer.param_groups}
        optimizer.step()
        cast(Any, self.lr_schedulers()).step()
        optimizer.zero_grad()
        self.progress.steps_done += 1
        if self.mutual_information.needs_fit:
            rates["lr/estimator"] = self.mi_config.learning_rate
        self.log_dict({**rates, "train/gradient_norm": norm})

    def trainables(self) -> dict[str, list[nn.Parameter]]:
        """Return what the main optimizer steps, by parameter group; groups may be empty."""
        temperature = [] if self.log_temperature is None else [self.log_temperature]
        return {**self.encoder.parameter_groups(), "temperature": temperature}

    def configure_optimizers(self) -> Any:
        """Build AdamW with its schedule for the embedder, and Adam for the estimator."""
        main = optimization.main_optimizer(self.trainables(), self.optimizer_config)
        steps = optimization.total_steps(self.trainer)
        schedule = optimization.learning_rate_schedule(main, self.optimizer_config, steps)
        optimizers: list[torch.optim.Optimizer] = [main]
        if self.mutual_information.needs_fit:
            parameters = self.mutual_information.parameters()
            optimizers.append(torch.optim.Adam(parameters, lr=self.mi_config.learning_rate))
        return optimizers, [schedule]

    def setup(self, stage: str) -> None:
        """Refuse a Trainer that cannot work before anything is trained; see ``training.settings``."""
        settings.check_trainer(self.trainer.strategy, self.trainer.precision)
        if stage == "fit":
            settings.check_fit(self.hparams, self.data_settings, self.encoder, self.trainer.strategy)

    def configure_model(self) -> None:
        """Shard the backbone under FSDP2; nothing to do for one process and for DDP."""
        if self.device_mesh is not None:
            assert self.fingerprint, "taken before the weights are sharded"
            shard_encoder(self.encoder, self.device_mesh["data_parallel"])

    def configure_callbacks(self) -> list[Callback]:
        """Return what every run has; the Trainer's own callback of the same class wins."""
        own = [type(callback) for callback in cast(Any, self.trainer).callbacks]
        return [default() for default in callbacks.DEFAULTS if default not in own]

    def on_train_start(self) -> None:
        """Give a resumed run this one's rates."""
        self.trained_data = dict(self.data_settings)
        rates = self.optimizer_config, self.mi_config
        optimization.apply_config(self.trainer.optimizers, self.lr_schedulers(), *rates)

    def on_save_checkpoint(self, content: dict[str, Any]) -> None:
        """Keep what trains; see ``training.checkpoint``."""
        checkpoint.save_into(content, self)

    def on_load_checkpoint(self, content: dict[str, Any]) -> None:
        """Check every key and load; see ``training.checkpoint``."""
        checkpoint.load_into(self, content)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load; without ``strict`` only what trains counts as missing."""
        keys = super().load_state_dict(state_dict, strict=strict, assign=assign)
        trains = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        keys.missing_keys[:] = [name for name in keys.missing_keys if strict or name in trains]
        return keys

    def forward(self, inputs: EncoderInputs, paths: Sequence[int] | None = None) -> Tensor:
        """Embed tokenised rows: ``[B, N', D]``; ``encode`` takes texts and images."""
        return cast(Tensor, self.encoder(inputs, paths))

    def validation_step(self, batch: RowBatch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Embed one batch of rows: ``[B, N', D]``. ``evaluation.run`` scores or keeps what this returns."""
        from parallel_decoupling.evaluation.encode import embed

        one_pass = self.device_mesh is not None  # of a sharded encoder, which all processes call together
        return (type(self).forward if one_pass else embed)(self, batch.inputs, batch.paths)

    test_step = validation_step
    predict_step = validation_step

    def on_validation_model_eval(self) -> None:
        """Enter evaluation mode when no thread encodes."""
        with self.encoder.turns.alone():
            self._in_training = set_training(self.modules(), False)

    def on_validation_model_train(self) -> None:
        """Go back to the modes of before the validation."""
        with self.encoder.turns.alone():
            set_training(self._in_training, True)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Identify the frozen weights, once: before they are sharded."""
        return backbone_fingerprint(self.encoder.backbone)

    def about(self) -> dict[str, Any]:
        """Return what stored embeddings say of this model; see ``model.identity.about_encoder``."""
        precision = None if self._trainer is None else str(self._trainer.precision)
        shaping = {name: self.hparams[name] for name in settings.SHAPES_EMBEDDINGS}
        conditions: dict[str, Any] = {"precision": precision, "settings": shaping}
        return about_encoder(self.encoder, fingerprint=self.fingerprint, **conditions)

    def run_info(self) -> dict[str, Any]:
        """Return settings, seed, steps and compute behind the weights, as plain values."""
        data = dict(self.trained_data or self.data_settings)
        content = {"hyper_parameters": dict(self.hparams), "data": data, "progress": asdict(self.progress)}
        return run_checkpoint.run_info(content)

    @property
    def images(self) -> ImagePolicy:
        """Return what happened to the pictures that the weights were trained on."""
        from parallel_decoupling.data.images import ImagePolicy

        return ImagePolicy.from_settings(self.trained_data)

    @property
    def embedder(self) -> Embedder:
        """Return the same weights without Lightning; pictures are treated as in training."""
        from parallel_decoupling.evaluation.embedder import Embedder

        instructions = self.query_instruction, self.candidate_instruction
        return Embedder(self.encoder, *instructions, self.images, **vars(self.limit), run=self.run_info())

    def encode(self, inputs: Any, **options: Any) -> Tensor:
        """Embed texts, images and dictionaries of both; see ``Embedder.encode``."""
        return self.embedder.encode(inputs, **options)

    def encode_query(self, inputs: Any, **options: Any) -> Tensor:
        """Embed queries; see ``Embedder.encode_query``."""
        return self.embedder.encode_query(inputs, **options)

    def encode_document(self, inputs: Any, **options: Any) -> Tensor:
        """Embed candidates; see ``Embedder.encode_document``."""
        return self.embedder.encode_document(inputs, **options)

    encode_candidate = encode_document

    def similarity(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare all pairs; see ``Embedder.similarity``."""
        return self.embedder.similarity(a, b)
