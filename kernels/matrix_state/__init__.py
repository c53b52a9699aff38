"""Shared by the ops whose state is a matrix: S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale q_t S_t.

It is not an op: it has no reference and no backend of its own. Used by gated_linear_attention, by ssd (with q = C, k = B, v = s x, g = s A) and by
causal linear_attention (without decay), each in its own `triton*.py`. The C++ kernels of the same ops share
csrc/include/medssm/matrix_state.h.

    triton_core             allocates and launches: `forward` and `backward` of one recurrence, a `Scan`
    triton_states           what each chunk of tokens adds to the state
    triton_carry            the state from chunk to chunk
    triton_outputs          the outputs of a chunk's tokens
    triton_token_gradients  gradients of v, and of q and k where the decay is not per key
    triton_gradients        gradients of the decays, and of q and k where the decay is per key
    triton_pairs            products of pairs of tokens where the decay is per key
    triton_tiles            loads that these kernels share
"""
