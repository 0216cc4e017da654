"""Any transformers causal LM under the same contract as our own model.

The one idea: the training loop asks a model for hidden states and an output head, never for logits, so all that is
wrapped is "last hidden state in, head beside it". A model whose logits are more than `head @ hidden` (soft-capped or
scaled logits, a bias) would be distilled wrongly and in silence, so loading probes for that and refuses by name.

Left out: the expert balance loss. Decoding uses transformers' own cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, Cache
from transformers.modeling_outputs import MoeModelOutputWithPast

from opd.config import ConfigError
from opd.fp4 import fake_quantize_linears
from opd.kernels import products
from opd.model.transformer import ModelOutput
from opd.weights import load_model_config, resolve_checkpoint

PROBE_TOKENS = 4
PROBE_LOGIT = 1000.0  # the probe blows logits up to this size, where every soft cap in use saturates
PROBE_TOLERANCE = 1e-4  # relative to the largest logit: FP32 rounding, and nothing else, passes


class HubModel(nn.Module):
    """A transformers causal LM as the loop sees a model.

    Its submodules are this module's own, under the same names, so parameters, snapshots and checkpoints keep the names
    of the published model. `config` is the transformers config.
    """

    _inner: Any

    def __init__(self, inner: Any) -> None:
        super().__init__()
        for name, child in inner.named_children():
            self.add_module(name, child)
        self.__dict__["_inner"] = inner  # not registered: its weights are already here, and names gain no prefix
        self.config = inner.config
        self.generation_config = inner.generation_config
        self.training = inner.training

    @property
    def head(self) -> nn.Parameter:
        """Output head [V, D]; with tied embeddings, the embedding itself."""
        return self._inner.get_output_embeddings().weight

    def forward(self, token_ids: torch.Tensor, lengths: torch.Tensor) -> ModelOutput:
        """`token_ids` int64 [B, T], right-padded with any id; `lengths` int64 [B]. Hidden states [B, T, D] follow the
        final norm and mean nothing at padded positions. The balance loss is 0 and the expert load is [0, 0]."""
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)
        mask = (positions < lengths.to(token_ids.device)[:, None]).long()
        output = self._inner.base_model(input_ids=token_ids, attention_mask=mask, use_cache=False)
        hidden = output.last_hidden_state
        return ModelOutput(
            hidden=hidden,
            balance_loss=torch.zeros((), dtype=torch.float32, device=hidden.device),
            expert_load=torch.zeros((0, 0), dtype=torch.int64, device=hidden.device),
        )

    def extend(
        self, token_ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache
    ) -> torch.Tensor:
        """New tokens of left-padded sequences whose earlier ones are in `cache`, which moves on: hidden [B, T, D].

        `token_ids` and `positions` (counted from a row's first real token; any value at padding) are int64 [B, T];
        `mask` int64 [B, cached + T] is 1 at real tokens, old and new. Hidden states mean nothing at padding.
        """
        output = self._inner.base_model(
            input_ids=token_ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True
        )
        return output.last_hidden_state

    def update_selection_bias(self, load: torch.Tensor, speed: float) -> None:
        """Does nothing: a published model's router has no selection bias of ours."""


def load_hub_model(path: str, revision: str | None = None, *, fp4: str = "none") -> HubModel:
    """Loads a folder or hub id in FP32, in evaluation mode, without running code from the checkpoint.

    With `fp4`, `ModelConfig.fp4`, "linears" its forward rounds the layers' large matrices to MXFP4 values.
    Raises ConfigError for what `resolve_checkpoint` refuses, for quantised or incomplete weights, for an architecture
    that transformers does not know, and for a model whose logits are not its head times its last hidden state, or
    whose matrices "linears" cannot round.
    """
    folder = resolve_checkpoint(path, revision)
    config = load_model_config(folder)
    if getattr(config, "quantization_config", None):
        raise ConfigError(f"{path} has quantised weights (quantization_config in its config.json); expected plain ones")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ConfigError(f"{path} does not load as a causal language model: {error}") from error
    inner, loading = loaded
    if absent := sorted(loading["missing_keys"]):
        raise ConfigError(f"{path} lacks {len(absent)} of its model's tensors, first {absent[0]!r}")
    _refuse_unless_logits_are_head_times_hidden(path, inner)
    products.use_in(inner)
    if fp4 == "linears":
        try:
            fake_quantize_linears(inner)
        except ValueError as error:
            raise ConfigError(f"{path}: {error}; set model.fp4=none") from None
    return HubModel(inner)


@torch.no_grad()
def _refuse_unless_logits_are_head_times_hidden(path: str, inner: Any) -> None:
    """Runs a few tokens with the head's output blown up, so that a cap is seen even where a small model's logits are
    far below it, and compares the model's own logits with head times hidden, blown up alike.

    Of a model whose weights are divided among ranks only the head is put together, and random states take the place of
    the trunk's: what happens to the logits afterwards is the same.
    """
    head = inner.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if head is None or weight is None:
        raise ConfigError(
            f"{path} ({type(inner).__name__}) has no output head of its own; expected a causal language model"
        )
    is_divided = hasattr(weight, "ds_id")
    if is_divided:
        weight.all_gather()
    token_ids = torch.arange(PROBE_TOKENS)[None].to(weight.device) % weight.shape[0]
    if is_divided:
        hidden = torch.randn(1, PROBE_TOKENS, weight.shape[1], generator=torch.Generator().manual_seed(0))
        hidden = hidden.to(weight)
    else:
        output = inner.base_model(input_ids=token_ids, use_cache=False)
        hidden = getattr(output, "last_hidden_state", None)
    if hidden is None or hidden.shape[-1] != weight.shape[1]:
        raise ConfigError(f"{path} ({type(inner).__name__}) gives no last hidden state of its head's width")
    expected = hidden @ weight.T
    scale = PROBE_LOGIT / expected.abs().max().clamp_min(1e-6)
    hook = head.register_forward_hook(lambda module, args, logits: logits * scale)
    try:
        with _given_states(inner.base_model, hidden) if is_divided else contextlib.nullcontext():
            logits = inner(input_ids=token_ids, use_cache=False).logits
    except RuntimeError as error:
        if not is_divided:
            raise
        raise ConfigError(
            f"{path} ({type(inner).__name__}) cannot be examined while its weights are divided among ranks ({error}); "
            "use learner.zero_stage 0, 1 or 2"
        ) from error
    finally:
        hook.remove()
    if logits.shape != expected.shape or not torch.allclose(
        logits, expected * scale, atol=PROBE_TOLERANCE * PROBE_LOGIT
    ):
        settings = {key: value for key, value in inner.config.to_dict().items() if "logit" in key and value}
        raise ConfigError(
            f"{path} ({type(inner).__name__}) computes logits that are not its head times its last hidden state, so "
            f"its distribution can not be rebuilt from hidden states; config.json sets {settings or 'no logit option'}"
        )
    if is_divided:
        weight.partition()


@contextlib.contextmanager
def _given_states(trunk: Any, hidden: torch.Tensor) -> Iterator[None]:
    """Inside, `trunk`, or the decoder that some have in it, answers with these states."""
    modules = [module for module in (trunk, getattr(trunk, "decoder", None)) if module is not None]
    for module in modules:
        module.forward = lambda *args, **kwargs: MoeModelOutputWithPast(last_hidden_state=hidden)
    try:
        yield
    finally:
        for module in modules:
            del module.forward
