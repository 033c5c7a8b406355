"""Decoding of Llama-shaped models (Llama, Mistral, Qwen2, Qwen3) by direct tensor operations on a plain key/value cache.

The Hugging Face modules are read at the start of every call and never kept, so weights cannot be stale; joining query, key and value matrices,
adding low-rank adapters and packing for the CPU's matrix kernels costs about as much time as two decoding steps and, while the call lasts, as
much memory as the weights once more. It differs from the modules' own forward by rounding only:

- the halves that rotary embedding pairs are interleaved by permuting rows of the query and key weights, so that a rotation is one complex product;
- in float32 the attention's scale is folded into the queries, and on the CPU residual sums and the gated MLP's product are fused into the matrix products;
- on the CPU norms are four operations, and in float32 the attention of a step is weighted sums of rows (see `_Bags`);
- the last layer of the prompt computes keys and values for all tokens, but the rest for each prompt's last token alone.

Cache layout: keys and values [N, H_kv, C, D] per layer; in float32 on the CPU C grows with the answers. A prompt stands at columns 0 … length − 1,
right-padded to the longest; the answers of all rows start at the same column, so a step writes one slice. A mask hides the padding between; positions
are each row's own. With several answers to a prompt (and float32) the prompts have a cache of their own, read once for all rows of a prompt: a fifth to
a half less time per step than with copies, from 32 tokens and 2 answers upwards, and as much less memory.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from telos.models.language import LanguageModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # angles that depend on the position alone, not on the batch's longest sequence
_PREFILL_TOKENS = 4096  # prompt tokens computed at once
_GROWTH = 64  # columns that a cache read by bags grows by, or a quarter of it where that is more


@functools.cache
def _packs_weights() -> bool:
    """Whether torch's packed CPU product is there and right. It is not public API, so it is tried before it is trusted."""
    try:
        x, weight = torch.arange(32.0).view(2, 16) / 32, torch.arange(48.0).view(3, 16).cos()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 2)
        plain = F.linear(x, weight)
        gate = torch.ops.mkldnn._linear_pointwise(x, packed, None, "swish", [], "")
        product = torch.ops.mkldnn._linear_pointwise.binary(x, gate, packed, None, "mul")
        total = torch.ops.mkldnn._linear_pointwise.binary(x, plain, packed, None, "add")
        return torch.allclose(product, F.silu(plain) * plain, atol=1e-5) and torch.allclose(total, 2 * plain, atol=1e-5)
    except Exception:
        return False


@functools.cache
def _keep_freed_memory() -> None:
    """Frees one block of 31 MiB, untouched, after which glibc's malloc holds up to twice as much freed memory instead of returning it to the system.

    The limit follows the largest block below 32 MiB that was ever freed. Without it every large tensor of a prompt comes from fresh pages: their
    faults take a seventh of the prompts' time (12 of 83 ms for 938 tokens of a model of 4 million parameters). Elsewhere it does nothing.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


class _Product:
    """x @ weight.T + bias in the compute precision. In float32 on the CPU the weight is packed once: 1.3 to 2 times as fast as a plain product at up to 64
    rows, and sums, gates and products with another tensor cost nothing more."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.bias = None if bias is None else bias.to(dtype)
        fused = dtype == torch.float32 and weight.device.type == "cpu" and _packs_weights()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight) if fused else None
        self.weight = None if fused else weight.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        if self.weight is not None:
            return residual + self(x)
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, self.bias, "add")

    def silu(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            return F.silu(self(x))
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "swish", [], "")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        if self.weight is not None:
            return self(x).mul_(other)
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.packed, self.bias, "mul")


class _Norm:
    """RMS norm over the last dimension. Torch's own is six operations on the CPU; these four take half its time, 9 µs for 32 rows of 256.

    x / √(mean x² + ε) = √D x / √(‖x‖² + D ε).
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps, self.fused = weight, eps, weight.device.type != "cpu"
        if not self.fused:
            size = len(weight)
            self.weight, self.least = weight * math.sqrt(size), torch.tensor(math.sqrt(size * eps))

    def __call__(self, x: Tensor) -> Tensor:
        if self.fused:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return (x * self.weight).div_(torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self.least))


def _norm(module: Any) -> _Norm:
    return _Norm(module.weight, module.variance_epsilon)


class _Cache:
    """Keys and values [N, H_kv, C, D] of one layer. Keys that are `turned` lie in memory as [N, H_kv, D, C]."""

    def __init__(self, rows: int, heads: int, columns: int, size: int, turned: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.values = torch.empty(rows, heads, columns, size, dtype=dtype, device=device)
        self.turned = turned
        self.keys = self.values.new_empty(rows, heads, size, columns).transpose(2, 3) if turned else torch.empty_like(self.values)

    def grown(self, rows: int, used: int, columns: int) -> _Cache:
        """A cache with room for more columns that holds what stands in the first rows and columns of this one."""
        _, heads, _, size = self.values.shape
        new = _Cache(rows, heads, columns, size, self.turned, self.values.dtype, self.values.device)
        new.write(slice(used), self.keys[:rows, :, :used], self.values[:rows, :, :used])
        return new

    def write(self, columns: int | slice, keys: Tensor, values: Tensor) -> None:
        """Sets columns of the first rows."""
        self.keys[: len(keys), :, columns] = keys
        self.values[: len(keys), :, columns] = values


class _Bags:
    """The products of attention for one query per row, in float32 on the CPU, as weighted sums of rows of a table, which is what `embedding_bag` computes.

    For scores the table's rows are the channels of turned keys, and their weights are a query; for outputs its rows are the values. Batched products,
    made for more queries than one, take 2.5 times as long (580 µs against 230 for both, 32 rows with 4 heads of 64 and 72 columns), and are no faster for
    any number of queries per key head up to 8.
    """

    def __init__(self, rows: int, heads: int, kv_heads: int, size: int) -> None:
        self.heads = heads
        self.bag = torch.arange(rows * heads, dtype=torch.int32)  # a bag is one head of one row
        self.table = (self.bag // (heads // kv_heads))[:, None]  # the key head that it reads, counted over all rows
        self.channels = self.table * size + torch.arange(size, dtype=torch.int32)

    def aim(self, rows: int, columns: int, used: int) -> None:
        """Sets what the bags of the next step hold: all channels, and the used ones of the columns that a cache has."""
        bags = rows * self.heads
        places = self.channels[:bags], self.table[:bags] * columns + torch.arange(used, dtype=torch.int32)
        self.keys, self.values = ((place.flatten(), self.bag[:bags] * place.shape[1]) for place in places)

    def scores(self, q: Tensor, keys: Tensor) -> Tensor:
        """[m, H, C] of queries [m, H, D]; columns that were never written have any score."""
        return self._sums(keys.transpose(2, 3), self.keys, q)

    def mix(self, weights: Tensor, values: Tensor) -> Tensor:
        """[m, H, D] of weights [m, H, used]."""
        return self._sums(values, self.values, weights)

    def _sums(self, table: Tensor, bags: tuple[Tensor, Tensor], weights: Tensor) -> Tensor:
        places, starts = bags
        sums = F.embedding_bag(places, table.flatten(0, 2), starts, mode="sum", per_sample_weights=weights.flatten())
        return sums.view(-1, self.heads, table.shape[3])


def _is_dense(module: Any) -> bool:
    """Whether a layer is linear, with at most plain low-rank adapters."""
    if type(module) is nn.Linear:
        return True
    if type(getattr(module, "base_layer", None)) is not nn.Linear:
        return False
    from peft.tuners.lora import Linear as LoraLinear

    if type(module) is not LoraLinear or module.fan_in_fan_out or (module.merged and module.disable_adapters):
        return False
    active = [name for name in module.active_adapters if name in module.lora_A]
    return not any(name in module.lora_variant or module.lora_B[name].bias is not None for name in active)


def _dense(module: Any) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of such a layer as it acts now, active adapters added."""
    if type(module) is nn.Linear:
        return module.weight, module.bias
    weight = module.base_layer.weight
    if not module.merged and not module.disable_adapters:
        for name in module.active_adapters:
            if name in module.lora_A:
                weight = weight + module.get_delta_weight(name)
    return weight, module.base_layer.bias


def reason_against(model: LanguageModel, longest: int) -> str | None:
    """Why this path cannot decode the model up to `longest` tokens, or None when it can."""
    config, base = model.config, model.base
    if model.is_encoder_decoder or config.model_type not in FAMILIES or not hasattr(base, "lm_head"):
        return f"it is no causal decoder of {', '.join(FAMILIES)}"
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"} or getattr(config, "sliding_window", None):
        window = getattr(config, "sliding_window", None)
        if window is None or longest > window:
            return f"sequences of {longest} tokens are longer than its attention window of {window}"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    stack = base.model
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in _FIXED_ROPE:
        return f"its rotary embedding is of type {kind}"
    if type(stack.embed_tokens) is not nn.Embedding or not _is_dense(base.lm_head):
        return "its embedding or output layer is wrapped"
    for layer in stack.layers:
        attention, mlp = layer.self_attn, layer.mlp
        parts = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        if not all(map(_is_dense, parts)):
            return "one of its projections is not a plain linear layer with plain low-rank adapters"
    if any(p.dtype != torch.float32 for p in base.parameters()):
        return "its weights are not in float32"
    return None


def _interleave(x: Tensor, size: int) -> Tensor:
    """Rows (or entries) of heads of `size`, reordered from halves (a₁ … a_h, b₁ … b_h) to pairs (a₁, b₁, a₂, b₂ …)."""
    return x.view(-1, 2, size // 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


class _Layer:
    def __init__(self, layer: Any, dtype: torch.dtype, scale: float) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        size = attention.head_dim
        (q, q_bias), (k, k_bias), (v, v_bias) = map(_dense, (attention.q_proj, attention.k_proj, attention.v_proj))
        self.norm_1, self.norm_2 = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self.head_norms: tuple[_Norm, _Norm] | None = None
        if hasattr(attention, "q_norm"):  # Qwen3 normalises each head, after which the scale of the projection is lost
            eps = attention.q_norm.variance_epsilon
            q_norm, k_norm = (_interleave(norm.weight, size) for norm in (attention.q_norm, attention.k_norm))
            self.head_norms = _Norm(q_norm * scale, eps), _Norm(k_norm, eps)
            scale = 1.0
        weights = [_interleave(q, size) * scale, _interleave(k, size), v]
        biases = None
        if q_bias is not None and k_bias is not None and v_bias is not None:
            biases = torch.cat([_interleave(q_bias, size) * scale, _interleave(k_bias, size), v_bias])
        self.qkv = _Product(torch.cat(weights), biases, dtype)
        self.out = _Product(*_dense(attention.o_proj), dtype)
        self.gate, self.up, self.down = (_Product(*_dense(m), dtype) for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))

    def mlp(self, x: Tensor) -> Tensor:
        """x + MLP(norm(x))."""
        y = self.norm_2(x)
        return self.down.plus(self.up.times(y, self.gate.silu(y)), x)


class LeanDecoder:
    """Reads the weights and decodes one batch of prompts; made anew for every call."""

    def __init__(self, model: LanguageModel) -> None:
        config, stack = model.config, model.base.model
        self.device = model.device
        self.dtype = torch.bfloat16 if model.precision == "bfloat16" else torch.float32
        self.direct = self.dtype == torch.float32  # attention by two products, which keep float32 and are faster for one query
        self.in_bags = self.direct and self.device.type == "cpu"
        self.head_dim = int(stack.layers[0].self_attn.head_dim)
        self.heads, self.kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        scale = self.head_dim**-0.5
        self.scale = 1.0 if self.direct else scale
        self.layers = [_Layer(layer, self.dtype, scale if self.direct else 1.0) for layer in stack.layers]
        self.embedding = stack.embed_tokens.weight
        self.norm = _norm(stack.norm)
        self.rotary = stack.rotary_emb
        self.head = _Product(*_dense(model.base.lm_head), self.dtype)

    # -- the prompt ---------------------------------------------------------------------------------------------------------------------------

    def start(self, prompts: list[list[int]], n: int, steps: int) -> Tensor:
        """Computes every prompt once, gives its keys and values to n rows, and returns the first logits [P n, V] float32."""
        device = self.device
        if device.type == "cpu":
            _keep_freed_memory()
        self.longest = longest = max(map(len, prompts))
        count = len(prompts)
        self.rows, self.groups = count * n, (count, n)
        self.shared = self.direct and n > 1

        def empty(rows: int, columns: int, turned: bool) -> list[_Cache]:
            return [_Cache(rows, self.kv_heads, columns, self.head_dim, turned, self.dtype, device) for _ in self.layers]

        self.column = 0 if self.shared else longest
        self.most = self.column + steps
        self.bags = _Bags(self.rows, self.heads, self.kv_heads, self.head_dim) if self.in_bags else None
        # Turned keys are read whole, so they grow with the answers.
        self.cache = empty(self.rows, self._room(self.column) if self.in_bags else self.most, self.in_bags)
        self.prompt = empty(count, longest, False) if self.shared else self.cache
        self.slot: Tensor | None = None  # the row that each row was at first; None while all are there
        places = torch.arange(longest + steps, device=device)
        cos, sin = self.rotary(self.embedding, places[None])
        half = self.head_dim // 2
        self.turns = torch.complex(cos[0, :, :half].float(), sin[0, :, :half].float())[:, None]  # [L, 1, D / 2]
        length = torch.tensor([len(prompt) for prompt in prompts], device=device)
        logits, first = [], 0
        while first < count:
            last, tokens = first + 1, len(prompts[first])
            while last < count and tokens + len(prompts[last]) <= _PREFILL_TOKENS:
                tokens += len(prompts[last])
                last += 1
            logits.append(self._prefill(prompts[first:last], length[first:last], n, first))
            first = last
        self.mask = self._hide(places[:longest] >= length[:, None])
        if self.mask is not None and not self.shared:
            self.mask = self.mask.repeat_interleave(n, 0)
        self.position = length.repeat_interleave(n)
        joined = torch.cat(logits)
        return joined if n == 1 else joined.repeat_interleave(n, 0)

    def _prefill(self, prompts: list[list[int]], length: Tensor, n: int, first: int) -> Tensor:
        count, longest = len(prompts), max(map(len, prompts))
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=self.device)
        inside = torch.arange(longest, device=self.device) < length[:, None]
        # The flat token of every place of the padded rows; where they are padded, some other token.
        place = (inside.flatten().cumsum(0) - 1).clamp_(min=0)
        row, column = inside.nonzero(as_tuple=True)
        home = row * longest + column
        final = length.cumsum(0) - 1
        turns = self.turns.index_select(0, column)
        x = self.embedding.index_select(0, ids)
        padding = self._hide(~inside)
        copies = 1 if self.shared else n
        for index, (layer, cache) in enumerate(zip(self.layers, self.prompt, strict=True)):
            y = layer.norm_1(x)
            q, kv = self._heads(layer, y, turns)
            # Keys and values by row: [P, longest, 2, H_kv, D] -> [2, P, H_kv, longest, D].
            kv = kv.index_select(0, place).view(count, longest, 2, self.kv_heads, self.head_dim).permute(2, 0, 3, 1, 4)
            for new, whole in zip(kv, (cache.keys, cache.values), strict=True):
                rows = whole[first * copies : (first + count) * copies]
                rows[:, :, :longest].unflatten(0, (count, copies)).copy_(new[:, None])
                rows[:, :, longest : self.longest].zero_()  # hidden later, but what is not a number cannot be hidden
            if index + 1 < len(self.layers):
                by_row = q.index_select(0, place).view(count, longest, self.heads, self.head_dim).transpose(1, 2)
                mixed = F.scaled_dot_product_attention(
                    by_row, kv[0], kv[1], is_causal=True, scale=self.scale, enable_gqa=self.heads != self.kv_heads
                )
                mixed = mixed.transpose(1, 2).reshape(count * longest, -1).index_select(0, home)
            else:  # only each prompt's last token goes on
                x, q = x.index_select(0, final), q.index_select(0, final)
                mixed = self._attend(q, kv[0], kv[1], padding)
            x = layer.mlp(layer.out.plus(mixed, x))
        return self._logits(x)

    # -- the answers ------------------------------------------------------------------------------------------------------------------------

    def step(self, token: Tensor) -> Tensor:
        """Feeds one token to every row; returns the next logits [m, V] float32."""
        turns = self.turns.index_select(0, self.position)
        self.position.add_(1)
        room = self.cache[0].values.shape[2]
        if self.column == room:
            room = self._room(room)
            for index, cache in enumerate(self.cache):  # one at a time, so that only one layer is held twice
                self.cache[index] = cache.grown(self.rows, self.column, room)
        self.column += 1
        if self.bags is not None:
            self.bags.aim(self.rows, room, self.column)
        x = self.embedding.index_select(0, token)
        for layer, cache, prompt in zip(self.layers, self.cache, self.prompt, strict=True):
            q, kv = self._heads(layer, layer.norm_1(x), turns)
            cache.write(self.column - 1, kv[:, 0], kv[:, 1])
            mixed = self._attend_cached(q, cache, prompt)
            x = layer.mlp(layer.out.plus(mixed, x))
        return self._logits(x)

    def compact(self, holes: Tensor, movers: Tensor, order: Tensor) -> None:
        """Keeps len(order) rows: the rows `movers` take the places `holes`, the rest stay where they are."""
        self.rows = len(order)
        if len(holes):
            for cache in self.cache:
                for part in (cache.keys, cache.values):
                    used = part[:, :, : self.column]
                    used[holes] = used[movers]
        self.position = self.position.index_select(0, order)
        if self.shared:
            self.slot = order if self.slot is None else self.slot.index_select(0, order)
        elif self.mask is not None:
            self.mask = self.mask.index_select(0, order)

    # -- parts ------------------------------------------------------------------------------------------------------------------------------------

    def _room(self, used: int) -> int:
        """The columns of a cache that has to grow: a multiple of the 16 floats of a vector register, which is faster to read."""
        return -(-min(used + max(_GROWTH, used // 4), self.most) // 16) * 16

    def _heads(self, layer: _Layer, y: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        """(queries [t, H, D], keys and values [t, 2, H_kv, D]) of normalised states, rotated."""
        heads, kv_heads, size = self.heads, self.kv_heads, self.head_dim
        qkv = layer.qkv(y).view(-1, heads + 2 * kv_heads, size)
        both = qkv[:, : heads + kv_heads]
        turned = both if self.direct else both.float()  # rotations are made in float32, as under autocast
        if layer.head_norms is not None:
            q_norm, k_norm = layer.head_norms
            turned[:, :heads], turned[:, heads:] = q_norm(turned[:, :heads]), k_norm(turned[:, heads:])
        torch.view_as_complex(turned.unflatten(-1, (-1, 2))).mul_(turns)
        if not self.direct:
            both.copy_(turned)
        return qkv[:, :heads], qkv[:, heads:].unflatten(1, (2, kv_heads))

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """[m, H D]: attention of one query per row, q [m, H, D], over keys and values [m, H_kv, L, D]; the mask covers their first columns."""
        full = None if mask is None else F.pad(mask, (0, keys.shape[2] - mask.shape[-1]))
        grouped = self.heads != self.kv_heads
        return F.scaled_dot_product_attention(q[:, :, None], keys, values, full, scale=self.scale, enable_gqa=grouped).reshape(len(q), -1)

    def _attend_cached(self, q: Tensor, cache: _Cache, prompt: _Cache) -> Tensor:
        """[m, H D]: the same over a layer's cache; a prompt's own cache, where there is one, is read once for the queries of all its rows."""
        keys, values = (x[: self.rows, :, : self.column] for x in (cache.keys, cache.values))
        if not self.direct:
            return self._attend(q, keys, values, self.mask)
        groups = q.unflatten(1, (self.kv_heads, -1))
        if self.bags is None:
            scores = torch.matmul(groups, keys.transpose(2, 3))
        else:
            scores = self.bags.scores(q, cache.keys)[..., : self.column].unflatten(1, (self.kv_heads, -1))
        if self.shared:
            far = torch.matmul(self._gather(groups), prompt.keys.transpose(2, 3))
            if self.mask is not None:
                far += self.mask
            scores = torch.cat([self._spread(far), scores], -1)
        elif self.mask is not None:
            scores[..., : self.mask.shape[-1]] += self.mask
        weights = torch.softmax(scores, -1)
        near = weights[..., -self.column :]
        mixed = torch.matmul(near, values) if self.bags is None else self.bags.mix(near.flatten(1, 2), cache.values).view_as(groups)
        if self.shared:
            mixed += self._spread(torch.matmul(self._gather(weights[..., : -self.column]), prompt.values))
        return mixed.reshape(len(q), -1)

    def _gather(self, x: Tensor) -> Tensor:
        """[m, H_kv, G, …] by rows -> [P, H_kv, n G, …] by prompts; rows that have left are zeros."""
        count, n = self.groups
        full = x if self.slot is None else x.new_zeros(count * n, *x.shape[1:]).index_copy_(0, self.slot, x)
        return full.unflatten(0, (count, n)).transpose(1, 2).flatten(2, 3)

    def _spread(self, x: Tensor) -> Tensor:
        """And back."""
        full = x.unflatten(2, (self.groups[1], -1)).transpose(1, 2).flatten(0, 1)
        return full if self.slot is None else full.index_select(0, self.slot)

    def _hide(self, padding: Tensor) -> Tensor | None:
        """[P, 1, 1, L] to add to scores: −inf at padding; None without any."""
        if not bool(padding.any()):
            return None
        return torch.zeros(padding.shape, dtype=self.dtype, device=self.device).masked_fill(padding, -torch.inf)[:, None, None]

    def _logits(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)).float()
