"""mamba_ssm.utils.generation on PyTorch: tokens one after another, greedy or drawn, with the states that InferenceParams keeps."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class InferenceParams:
    """What a model keeps between the calls of one generation.

    max_seqlen, max_batch_size: the largest that will come. seqlen_offset: tokens before this call, 0 for the first part of the sequence.
    key_value_memory_dict: each mixer's state, by its layer_idx. batch_size_offset, lengths_per_sample: for attention alone.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Begin again at the first token. The states stay; the first part of a sequence overwrites them."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


@dataclass
class GenerateDecoderOnlyOutput:
    """sequences (b, l): the prompt and the tokens behind it. scores: the logits (b, vocabulary) of each of those tokens, None if not asked for."""

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None


def modify_logits_for_min_p_filtering(logits: Tensor, min_p: float) -> None:
    """Set to -inf, in place, what is less likely than min_p times the likeliest. min_p outside of (0, 1) changes nothing."""
    if 0 < min_p < 1:
        probabilities = logits.softmax(-1)
        logits.masked_fill_(probabilities < min_p * probabilities.amax(-1, keepdim=True), -torch.inf)


def modify_logits_for_top_k_filtering(logits: Tensor, top_k: int) -> None:
    """Set to -inf, in place, what is below the top_k largest."""
    logits.masked_fill_(logits < logits.topk(top_k).values[..., -1:], -torch.inf)


def modify_logits_for_top_p_filtering(logits: Tensor, top_p: float) -> None:
    """Set to -inf, in place, all but the likeliest that together reach the probability top_p. top_p outside of (0, 1) changes nothing."""
    if 0 < top_p < 1:
        ascending, places = logits.sort(-1)
        unlikely = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        logits.masked_fill_(unlikely.scatter(-1, places, unlikely), -torch.inf)


def modify_logit_for_repetition_penalty(logits: Tensor, prev_output_tokens: Tensor, repetition_penalty: float = 1.0) -> Tensor:
    """Divide, in place, positive logits (b, vocabulary) of earlier tokens (b, l) by the penalty and multiply negative ones (arXiv 1909.05858)."""
    scores = logits.gather(1, prev_output_tokens)
    return logits.scatter_(1, prev_output_tokens, torch.where(scores < 0, scores * repetition_penalty, scores / repetition_penalty))


def sample(logits: Tensor, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """One token (b,) for each row of logits (b, vocabulary).

    top_k: 1 takes the largest; a larger one draws among as many; 0 among all. Their logits are divided by temperature; then min_p and top_p leave out
    the unlikely ones. mamba_ssm applies min_p only where top_k is 0, before the temperature, and compares logits with the first one of a single row.
    """
    if top_k == 1:
        return logits.argmax(-1)
    if top_p > 1:
        raise ValueError(f"top_p: expected at most 1, got {top_p}")
    values, tokens = logits.topk(min(top_k, logits.shape[-1]) if top_k > 0 else logits.shape[-1])
    values = values.float() / temperature
    modify_logits_for_min_p_filtering(values, min_p)
    modify_logits_for_top_p_filtering(values, top_p)
    return tokens.gather(-1, values.softmax(-1).multinomial(1)).squeeze(-1)


@torch.inference_mode()
def decode(
    input_ids: Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    output_scores: bool = False,
    streamer: Any = None,
) -> GenerateDecoderOnlyOutput:
    """Continue the prompts input_ids (b, l), all of one length, up to max_length tokens, by one at least.

    Args:
        model: called as model(tokens, position_ids=, inference_params=, num_last_tokens=1), with a result that has logits (b, 1, vocabulary).
        top_k to temperature: as `sample`. repetition_penalty: as `modify_logit_for_repetition_penalty`.
        eos_token_id: ends where all rows have this token at once. teacher_outputs: (b, any), tokens to take in place of samples as long as there are.
        vocab_size: of the logits count only the first so many. output_scores: keep the logits, as they were before any penalty.
        enable_timing: print the time that it took. streamer: gets the prompt and each token by its put, then end. cg: of no effect.
    """
    started = time.perf_counter()
    params = InferenceParams(max_seqlen=max_length, max_batch_size=len(input_ids))
    sequences, tokens, scores = input_ids, input_ids, []
    if streamer is not None:
        streamer.put(input_ids.cpu())
    while True:
        offset = params.seqlen_offset
        positions = torch.full_like(tokens, offset) if offset else None
        logits = model(tokens, position_ids=positions, inference_params=params, num_last_tokens=1).logits.squeeze(1)[..., :vocab_size]
        if output_scores:
            scores.append(logits.clone())
        params.seqlen_offset = offset = offset + tokens.shape[1]
        if repetition_penalty != 1:
            logits = modify_logit_for_repetition_penalty(logits, sequences, repetition_penalty)
        if teacher_outputs is not None and offset < teacher_outputs.shape[1]:
            tokens = teacher_outputs[:, offset, None]
        else:
            tokens = sample(logits, top_k, top_p, min_p, temperature)[:, None]
        sequences = torch.cat([sequences, tokens], 1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        if offset >= max_length - 1 or (eos_token_id is not None and bool((tokens == eos_token_id).all())):
            break
    if streamer is not None:
        streamer.end()
    if enable_timing:
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        print(f"Prompt processing + decoding time: {1000 * (time.perf_counter() - started):.0f}ms")
    return GenerateDecoderOnlyOutput(sequences, tuple(scores) if output_scores else None)


class GenerationMixin:
    """`generate` for a model that keeps its states by inference_params."""

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int | None, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        """The model's states before the first token, by layer."""
        raise NotImplementedError(f"{type(self).__name__}.allocate_inference_cache: expected in the model's class")

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """The continued sequences (b, max_length), or with return_dict_in_generate `decode`'s result; arguments as `decode`."""
        output = decode(input_ids, self, max_length, top_k, top_p, min_p, temperature, output_scores=output_scores, **kwargs)
        return output if return_dict_in_generate else output.sequences
