"""The model against an independent implementation, against itself with a cache, compiled, and at the sizes of the recipe."""
import math

import pytest
import torch

from nanochat import gpt, hf
from nanochat.attention import KVCache
from nanochat.common import NanochatError
from nanochat.gpt import GPT, GPTConfig, RECIPES
from nanochat.tokenizer import Tokenizer

SIZES = [dict(depth=1, n_embd=32, n_head=2, n_kv_head=2), dict(depth=3, n_embd=64, n_head=4, n_kv_head=2),
         dict(depth=4, n_embd=128, n_head=2, n_kv_head=1), dict(depth=5, vocab_size=300), dict(depth=2, n_embd=48, n_head=3, n_kv_head=3, rope_base=500.0, softcap=0.0)]
ONE_BY_ONE = {name: {name: value} for name, value in RECIPES["modern"].items()}  # every switch alone
MODERN = {name: dict(depth=5, n_embd=64, n_head=4, n_kv_head=2) | fields for name, fields in ONE_BY_ONE.items()} | {
    "modern": dict(depth=5, n_embd=64, n_head=4, n_kv_head=4, recipe="modern"), "modern with shared heads": dict(depth=4, n_embd=64, n_head=4, n_kv_head=2, recipe="modern"),
    "modern with one head": dict(depth=1, n_embd=32, n_head=2, n_kv_head=1, recipe="modern"), "all layers short": dict(depth=3, n_embd=32, n_head=2, window_pattern="S")}
every_switch = pytest.mark.parametrize("sizes", MODERN.values(), ids=MODERN)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    "Models this small run faster on one thread, above all beside other work"
    before = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def lively(seed=0, dtype=torch.float32, **sizes):
    "A model with random weights everywhere: fresh ones have zeros that hide mistakes"
    torch.manual_seed(seed)
    model = GPT(GPTConfig.from_depth(**dict(dict(vocab_size=97, sequence_len=64), **sizes)), compute_dtype=dtype)
    for p in model.parameters(): torch.nn.init.normal_(p, std=1.2 / p.size(-1)**0.5)
    return model


def tokens(model, *shape): return torch.randint(0, model.config.vocab_size, shape)


@pytest.mark.parametrize("depth, weights, flops", [(20, 560_988_160, 3.49e9), (26, 1_081_999_360, 6.9e9), (32, 1_879_048_192, 1.208e10)])
def test_sizes_of_the_recipe(depth, weights, flops):
    with torch.device("meta"): model = GPT(GPTConfig.from_depth(depth))
    assert model.num_params() == weights
    assert model.flops_per_token() == pytest.approx(flops, rel=2e-3)
    assert (model.config.n_head, model.config.head_dim) == (math.ceil(depth / 2), 128)


@pytest.mark.parametrize("depth, millions", [(12, 286.3), (20, 897), (24, 1384.1)])
def test_sizes_of_the_modern_recipe(depth, millions):
    with torch.device("meta"): model = GPT(GPTConfig.from_depth(depth, vocab_size=32768, recipe="modern"))
    assert model.num_params() / 1e6 == pytest.approx(millions, abs=0.6)


ADDED = dict(residual_lambdas=2 * 20, value_embeddings=10 * (65536 * 1280 + 10 * 12), window_pattern=0, smear=24 + 1, backout=1, qk_scale=0, rope_base=0)  # weights, at depth 20


@pytest.mark.parametrize("switch, added", ADDED.items(), ids=ADDED)
def test_what_each_switch_adds_in_weights_and_operations(switch, added):
    with torch.device("meta"): classic, model = GPT(GPTConfig.from_depth(20)), GPT(GPTConfig.from_depth(20, **ONE_BY_ONE[switch]))
    assert model.num_params() - classic.num_params() == added
    multiplied = dict(value_embeddings=10 * 10 * 12, smear=24).get(switch, 0)  # only the gates are products; tables are looked up
    saved = 15 * (2048 - 512) if switch == "window_pattern" else 0  # keys that 15 of the 20 layers need not see
    assert model.flops_per_token() - classic.flops_per_token() == 6 * multiplied - 12 * 1280 * saved


@pytest.mark.parametrize("fields", [{}] + [ONE_BY_ONE[name] for name in ADDED], ids=["classic", *ADDED])
def test_operations_by_the_formula_are_those_that_run(fields):
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"): model, ids = GPT(GPTConfig.from_depth(4, vocab_size=512, sequence_len=1024, n_embd=128, **fields)), torch.zeros(1, 1024, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter: model(ids, ids)
    c = model.config
    per_layer = [4 * 128 * (2 * w - w * w / 1024) if (w := c.window(i)) else 4 * 128 * 1024 for i in range(4)]  # blocks of w queries meet 2w keys, the first w
    in_attention = 12 * 128 * sum(c.window(i) or 1024 for i in range(4))  # what the formula says of attention; its products are 1/3 of it forward
    assert counter.get_total_flops() / 1024 == (model.flops_per_token() - in_attention) / 3 + sum(per_layer)


CLASSIC_NAMES = {"transformer.wte.weight", "lm_head.weight"} | {f"transformer.h.{i}.{name}.weight" for i in range(4) for name in ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
NEW_SHAPES = dict(residual_lambdas={"transformer.resid_lambdas": (4,), "transformer.x0_lambdas": (4,)}, backout={"transformer.backout_lambda": (1,)},
                  value_embeddings={f"transformer.value_embeds.{i}.weight": (97, 32) for i in (1, 3)} | {f"transformer.h.{i}.attn.ve_gate.weight": (2, 12) for i in (1, 3)},
                  smear={"transformer.smear_gate.weight": (1, 24), "transformer.smear_lambda": (1,)})


@pytest.mark.parametrize("fields", [{}, *ONE_BY_ONE.values(), dict(recipe="modern")], ids=["classic", *ONE_BY_ONE, "modern"])
def test_names_that_optimizers_and_checkpoints_rely_on(fields):
    model = GPT(GPTConfig.from_depth(4, vocab_size=97, sequence_len=64, n_embd=64, n_head=4, n_kv_head=2, **fields))
    new = {name: shape for switch in NEW_SHAPES if getattr(model.config, switch) for name, shape in NEW_SHAPES[switch].items()}
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert found.keys() == CLASSIC_NAMES | new.keys() and all(found[name] == shape for name, shape in new.items())
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_recipe_is_its_switches_and_an_override_wins():
    classic = GPTConfig.from_depth(6)
    assert classic == GPTConfig.from_depth(6, recipe="classic") and not classic.switched
    modern = GPTConfig.from_depth(6, recipe="modern")
    assert set(modern.switched) == RECIPES["modern"].keys() - {"rope_base"} and (modern.rope_base, modern.qk_scale) == (100000.0, 1.2)
    off = {name: getattr(GPTConfig, name) for name in RECIPES["modern"]}
    assert GPTConfig.from_depth(6, recipe="modern", **off) == classic
    assert GPTConfig.from_depth(6, smear=True).switched == ["smear"]
    with pytest.raises(NanochatError, match="recipe 'ancient' is unknown; choose classic or modern"): GPTConfig.from_depth(6, recipe="ancient")


def test_first_values_of_what_the_switches_add():
    model = GPT(GPTConfig.from_depth(5, vocab_size=97, sequence_len=64, recipe="modern"))
    t, ids = model.transformer, tokens(model, 2, 20)
    assert torch.allclose(t.resid_lambdas, torch.tensor([1.15, 1.125, 1.1, 1.075, 1.05])) and torch.allclose(t.x0_lambdas, torch.tensor([.2, .1625, .125, .0875, .05]))
    assert t.smear_lambda.item() == 0 and t.backout_lambda.item() == pytest.approx(.2)
    assert all(0 <= gate.min() and gate.max() <= .02 and gate.std() > 0 for gate in (t.smear_gate.weight, t.h[4].attn.ve_gate.weight))
    table, bound = t.value_embeds["4"].weight, (3 / 320)**.5
    assert table.abs().max() <= bound and table.std().item() == pytest.approx(bound / 3**.5, rel=.05)
    assert model(ids, ids).item() == pytest.approx(math.log(97), abs=1e-5)


@pytest.mark.parametrize("depth", range(1, 34))
def test_every_depth_gives_heads_that_kernels_accept(depth):
    config = GPTConfig.from_depth(depth)
    assert config.head_dim * config.n_head == 64 * depth and config.head_dim % 8 == 0 and config.head_dim <= 128


def test_initial_loss_is_ln_v_and_blocks_start_as_wires():
    model = GPT(GPTConfig.from_depth(2, vocab_size=512, sequence_len=32))
    ids = tokens(model, 2, 32)
    assert model(ids, ids).item() == pytest.approx(math.log(512), abs=1e-5)
    assert model.transformer.h[0].attn.c_proj.weight.abs().max() == 0 == model.transformer.h[1].mlp.c_proj.weight.abs().max()
    assert model.transformer.h[0].mlp.c_proj.weight.dtype == torch.float32


@pytest.mark.parametrize("sizes", SIZES)
@torch.no_grad()
def test_rows_of_different_lengths_in_one_cache_give_the_logits_of_the_plain_pass(sizes):
    model = lively(**sizes)
    ids = tokens(model, 4, 40)
    plain = model(ids)
    cache, busy = model.make_cache(5, 48), 4
    for row, n in enumerate((17, 1, 30, 8)):
        one = model.make_cache(1, n)
        assert torch.allclose(model(ids[row:row+1, :n], cache=one), plain[row:row+1, :n], atol=1e-5)
        cache.copy_from(one, 0, row)
    rows = torch.arange(busy)[:, None]
    for T in (1, 1, 3, 1):  # the fifth slot stays idle
        at = cache.lengths[:busy, None] + torch.arange(T)
        got = model(ids[rows, at], cache=cache.first(busy))
        assert torch.allclose(got, plain[rows, at], atol=1e-5)
    assert cache.lengths.tolist() == [23, 7, 36, 14, 0]


def by_definition(model, ids):
    "Logits of one row by the formulas of the reference system, October 2025 and 2026, in float64, one query and head at a time"
    c, w = model.config, {name: p.detach().double() for name, p in model.named_parameters()}
    H, G, D, T, L = c.n_head, c.n_head // c.n_kv_head, c.n_embd // c.n_head, len(ids), c.n_layer
    def unit(x): return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    def turn(x):  # (T, heads, D)
        angles = torch.outer(torch.arange(T).double(), c.rope_base ** (-torch.arange(0, D, 2).double() / D))[:, None]
        y = torch.complex(x[..., :D//2], x[..., D//2:]) * torch.polar(torch.ones_like(angles), -angles)
        return torch.cat([y.real, y.imag], -1)
    x = unit(w["transformer.wte.weight"][ids])
    if c.smear:
        before = torch.cat([torch.zeros(1, c.n_embd).double(), x[:-1]])
        x = x + w["transformer.smear_lambda"] * torch.sigmoid(x[:, :24] @ w["transformer.smear_gate.weight"].T) * before
    x0 = x
    for i in range(L):
        p = f"transformer.h.{i}."
        if c.residual_lambdas: x = w["transformer.resid_lambdas"][i] * x + w["transformer.x0_lambdas"][i] * x0
        h = unit(x)
        q, k, v = ((h @ w[f"{p}attn.{name}.weight"].T).view(T, -1, D) for name in ("c_q", "c_k", "c_v"))
        if c.value_embeddings and i in range(L - 1, -1, -2):
            v = v + 3 * torch.sigmoid(h[:, :12] @ w[p + "attn.ve_gate.weight"].T)[..., None] * w[f"transformer.value_embeds.{i}.weight"][ids].view(T, -1, D)
        q, k = c.qk_scale * unit(turn(q)), c.qk_scale * unit(turn(k))
        short, out = c.window_pattern[i % len(c.window_pattern)] == "S" and i < L - 1, torch.zeros(T, H, D).double()
        for t in range(T):
            near = slice(max(0, t - 15) if short else 0, t + 1)  # a quarter of 64: 16 tokens
            for head in range(H): out[t, head] = (k[near, head // G] @ q[t, head] / D**.5).softmax(0) @ v[near, head // G]
        x = x + out.view(T, -1) @ w[p + "attn.c_proj.weight"].T
        x = x + (unit(x) @ w[p + "mlp.c_fc.weight"].T).relu().square() @ w[p + "mlp.c_proj.weight"].T
        if i + 1 == (L + 1) // 2: half = x
    if c.backout: x = x - w["transformer.backout_lambda"] * half
    y = unit(x) @ w["lm_head.weight"].T
    return c.softcap * torch.tanh(y / c.softcap)


@pytest.mark.parametrize("sizes", [SIZES[1], *MODERN.values()], ids=["classic", *MODERN])
@torch.no_grad()
def test_logits_are_those_of_the_definition(sizes):
    model = lively(**sizes)
    ids = tokens(model, 2, 45)
    assert (model(ids) - torch.stack([by_definition(model, row) for row in ids])).abs().max() < 1e-4


@every_switch
def test_every_switch_changes_the_logits(sizes):
    if sizes["depth"] == 1: pytest.skip("one layer is an L, the last, and has nothing to take back")
    model = lively(**sizes)
    plain, ids = lively(**{k: v for k, v in sizes.items() if k == "depth" or k.startswith("n_")}), tokens(model, 1, 45)
    own = model.state_dict()
    plain.load_state_dict({name: own[name] for name in plain.state_dict()})
    with torch.no_grad(): assert (model(ids) - plain(ids)).abs().max() > 1e-2


@every_switch
@torch.no_grad()
def test_cached_rows_of_every_kind_give_the_logits_of_the_plain_pass(sizes):
    model = lively(**sizes)
    ids = tokens(model, 4, 60)
    plain, cache = model(ids), model.make_cache(5, 64)
    filler = model.make_cache(4, 40); model(ids[:, :40], cache=filler)  # read with padding, then cut to the true lengths, as the engine does
    filler.lengths.copy_(torch.tensor([33, 1, 17, 24]))
    for row in range(4): cache.copy_from(filler, row, row)
    rows = torch.arange(4)[:, None]
    for T in (1, 1, 5, 1, 18, 1):  # the fifth slot stays idle
        at = cache.lengths[:4, None] + torch.arange(T)
        assert torch.allclose(model(ids[rows, at], cache=cache.first(4)), plain[rows, at], atol=2e-5)
    cache.reset([0, 1]); cache.copy_from(cache, 2, 3)  # two rows start over in used slots, another becomes a copy
    ids[:2], ids[3] = tokens(model, 2, 60), ids[2]; plain = model(ids)
    for T in (1, 1, 3):
        at = cache.lengths[:4, None] + torch.arange(T)
        assert torch.allclose(model(ids[rows, at], cache=cache.first(4)), plain[rows, at], atol=2e-5)


@pytest.mark.parametrize("by_token", [False, True])
@every_switch
@torch.no_grad()
def test_a_text_read_in_pieces_of_any_length_gives_the_same_logits(sizes, by_token):
    model = lively(**sizes)
    ids, pieces = tokens(model, 2, 80), []
    cache = model.make_cache(2, 80, by_token)
    for part in ids.split([1, 16, 1, 17, 30, 1, 14], dim=1): pieces.append(model(part, cache=cache))
    assert torch.allclose(torch.cat(pieces, 1), model(ids), atol=2e-5)


@pytest.mark.parametrize("sizes", [dict(depth=3, n_embd=32, n_head=2), dict(depth=4, n_embd=32, n_head=2) | RECIPES["modern"]])
def test_what_blocks_forget_and_compute_again_gives_the_same_gradients(sizes):
    model, kept, gradients = lively(**sizes), {}, {}
    ids = tokens(model, 2, 33)
    for recompute in (False, True):
        model.recompute, held = recompute, []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.nbytes) or t, lambda t: t): loss = model(ids[:, :-1], ids[:, 1:])
        model.zero_grad()
        loss.backward()
        kept[recompute], gradients[recompute] = sum(held), [p.grad.clone() for p in model.parameters()]
    assert kept[True] < kept[False] / 2
    for a, b in zip(gradients[False], gradients[True]): torch.testing.assert_close(a, b, rtol=0, atol=0)


@torch.no_grad()
def test_a_window_reads_no_more_keys_than_it_needs():
    model = lively(depth=2, n_embd=32, n_head=2, window_pattern="S")
    cache, read = model.make_cache(2, 64), []
    update = KVCache.update
    def spy(self, *args): keys, values = update(self, *args); read.append(keys.size(2)); return keys, values
    KVCache.update = spy
    try:
        model(tokens(model, 2, 50), cache=cache); model(tokens(model, 2, 1), cache=cache)
        cache.lengths[1] = 45; model(tokens(model, 2, 1), cache=cache)
    finally: KVCache.update = update
    assert read == [50, 50, 16, 51, 22, 52]  # layer 0 has a window of 16, layer 1 is the last; then rows at 51 and 45


@torch.no_grad()
def test_a_slot_that_is_used_again_forgets_its_last_text():
    model = lively(**SIZES[1])
    cache, ids = model.make_cache(2, 32), tokens(model, 2, 20)
    model(ids, cache=cache)
    cache.reset(1)
    first = tokens(model, 2, 1)
    assert cache.lengths.tolist() == [20, 0] and torch.allclose(model(first, cache=cache)[1, 0], model(first[1:])[0, 0], atol=1e-5)
    fresh, ids = tokens(model, 1, 5), torch.cat([ids, first], 1)
    one = model.make_cache(1, 5); model(fresh, cache=one); cache.copy_from(one, 0, 1)
    step = tokens(model, 2, 1)
    got = model(step, cache=cache)
    assert torch.allclose(got[1, 0], model(torch.cat([fresh, step[1:]], 1))[0, -1], atol=1e-5)
    assert torch.allclose(got[0, 0], model(torch.cat([ids[:1], step[:1]], 1))[0, -1], atol=1e-5)


@torch.no_grad()
def test_last_only_is_the_last_of_all_logits():
    model = lively(**SIZES[1])
    ids = tokens(model, 2, 9)
    assert torch.allclose(model(ids, last_only=True), model(ids)[:, -1:], atol=1e-6)


def test_a_full_cache_and_a_wrong_dtype_are_refused_in_one_line():
    model = lively(**SIZES[0])
    cache = model.make_cache(1, 4)
    with pytest.raises(NanochatError, match="max_len=5"): model(tokens(model, 1, 5), cache=cache)
    assert cache.lengths.tolist() == [0]
    with pytest.raises(NanochatError, match="dtype=torch.float32"): model(tokens(model, 1, 2), cache=KVCache(model.config, 1, 4, dtype=torch.bfloat16))
    with pytest.raises(NanochatError, match="rotary tables end at 640"): model(tokens(model, 1, 641))
    with pytest.raises(NanochatError, match="rotary tables end at 640"): model(tokens(model, 1, 2), cache=model.make_cache(1, 641))


@pytest.mark.parametrize("wrong", [dict(n_head=3), dict(n_kv_head=3), dict(vocab_size=0), dict(n_layer=0), dict(window_pattern=""), dict(window_pattern="SXL"),
                                   dict(n_embd=16, n_head=2, smear=True), dict(n_embd=8, n_head=2, value_embeddings=True)])
def test_sizes_that_do_not_fit_are_refused(wrong):
    with pytest.raises(NanochatError): GPTConfig(**dict(dict(n_embd=64, n_head=4, n_kv_head=2), **wrong))


@pytest.mark.parametrize("sizes", [SIZES[1], MODERN["modern"]], ids=["classic", "modern"])
def test_loss_in_chunks_equals_loss_at_once(sizes, monkeypatch):
    model, results = lively(**sizes), []
    ids, targets, weights = tokens(model, 3, 20), tokens(model, 3, 20).masked_fill(torch.rand(3, 20) < .3, -1), torch.randn(3, 20)
    for limit in (2**28, 7 * 97):
        monkeypatch.setattr(gpt, "LOGITS_PER_CHUNK", limit)
        model.zero_grad(); loss = model(ids, targets, weights, reduction="sum"); loss.backward()
        results.append((loss.item(), [p.grad.clone() for p in model.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-4)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(results[0][1], results[1][1]))


def test_weights_targets_and_reductions_of_the_loss():
    model = lively(**SIZES[1])
    ids, targets, weights = tokens(model, 2, 12), tokens(model, 2, 12).masked_fill(torch.rand(2, 12) < .5, -1), torch.randn(2, 12)
    nll = -model(ids).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)
    assert torch.allclose(model(ids, targets, reduction="none"), nll, atol=1e-5)
    assert torch.allclose(model(ids, targets, weights, reduction="sum"), (nll * weights).sum(), atol=1e-4)
    assert torch.allclose(model(ids, targets), nll.sum() / (targets >= 0).sum(), atol=1e-5)
    with pytest.raises(NanochatError, match="'mean', 'sum' or 'none'"): model(ids, targets, reduction="avg")


def test_a_batch_without_targets_has_loss_and_gradient_zero():
    model = lively(**SIZES[0])
    loss = model(tokens(model, 2, 8), torch.full((2, 8), -1)); loss.backward()
    assert loss.item() == 0 and all(p.grad.abs().max() == 0 for p in model.parameters())


@pytest.mark.parametrize("sizes", [SIZES[1], *MODERN.values()], ids=["classic", *MODERN])
def test_no_token_sees_its_future(sizes):
    model = lively(**sizes)
    ids = tokens(model, 1, 16); other = ids.clone(); other[0, 9:] = tokens(model, 1, 7)
    with torch.no_grad(): assert torch.equal(model(ids)[:, :9], model(other)[:, :9])


@pytest.mark.parametrize("sizes", [SIZES[1], MODERN["modern"]], ids=["classic", "modern"])
def test_bfloat16_keeps_float32_masters_and_stays_close(sizes):
    model = lively(**sizes); ids = tokens(model, 2, 32)
    exact = model(ids).detach()
    model.compute_dtype = torch.bfloat16
    loss = model(ids, ids); loss.backward()
    assert loss.dtype == torch.float32 == model.lm_head.weight.grad.dtype
    assert (model(ids) - exact).abs().mean() < 0.1
    with torch.no_grad(): cast = model(ids)
    model.to_inference()
    assert model.lm_head.weight.dtype == torch.bfloat16 and not model.lm_head.weight.requires_grad
    assert torch.equal(model(ids), cast)  # casting once or at every use is the same
    assert all(p.dtype == (torch.bfloat16 if p.ndim > 1 else torch.float32) for p in model.parameters())


def test_every_parameter_of_every_switch_learns():
    model = lively(**MODERN["modern with shared heads"])
    ids = tokens(model, 2, 40); model(ids[:, :-1], ids[:, 1:]).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in model.parameters())


def test_modern_models_start_on_meta_and_come_back_from_a_checkpoint(tmp_path):
    from nanochat.checkpoint import load_checkpoint, save_checkpoint
    config = GPTConfig.from_depth(3, vocab_size=97, sequence_len=64, n_embd=64, n_head=4, recipe="modern")
    with torch.device("meta"): late = GPT(config)
    late.to_empty(device="cpu"); torch.manual_seed(7); late.init_weights()
    model = GPT(config); torch.manual_seed(7); model.init_weights()
    assert late.state_dict().keys() == model.state_dict().keys() and all(torch.equal(a, b) for a, b in zip(late.state_dict().values(), model.state_dict().values()))
    path = save_checkpoint(tmp_path / "base", 1, model := lively(**MODERN["modern"]))
    other = lively(seed=1, **MODERN["modern"])
    assert GPTConfig(**load_checkpoint(path, other)["model_config"]) == model.config
    with torch.no_grad(): assert torch.equal(other(ids := tokens(model, 2, 40)), model(ids))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [SIZES[1], MODERN["modern with shared heads"]], ids=["classic", "modern"])
def test_training_path_compiles_to_one_graph_with_the_same_loss_and_gradients(sizes):
    model = lively(**sizes)
    ids, targets, weights = tokens(model, 2, 32), tokens(model, 2, 32).masked_fill(torch.rand(2, 32) < .3, -1), torch.rand(2, 32)
    plain = model(ids, targets, weights, reduction="sum"); plain.backward()
    gradients = [p.grad.clone() for p in model.parameters()]; model.zero_grad()
    loss = torch.compile(model, fullgraph=True, dynamic=False)(ids, targets, weights, reduction="sum"); loss.backward()
    assert loss.item() == pytest.approx(plain.item(), abs=1e-3)
    assert all(torch.allclose(p.grad, g, atol=1e-3) for p, g in zip(model.parameters(), gradients))


# The same model in transformers


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["The cat sat on the mat, and the dog sat on the cat's tail. ", "12 + 30 = 42, isn't it? Größe, naïve, 東京, 🙂!\n\n\tdef f(x):\n\t\treturn x\n"] * 20
    return Tokenizer.train(texts, 300)


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers", minversion="5.0")
    module.logging.set_verbosity_error(); module.logging.disable_progress_bar()
    return module


@pytest.mark.parametrize("sizes", SIZES)
@torch.no_grad()
def test_transformers_gives_the_same_logits_and_the_same_greedy_text(sizes, tokenizer, transformers, tmp_path):
    model = lively(**dict(sizes, vocab_size=tokenizer.vocab_size)).eval()
    twin = transformers.AutoModelForCausalLM.from_pretrained(hf.save(model, tokenizer, tmp_path / "out")).eval()
    ids = tokens(model, 2, 64)
    assert (model(ids) - twin(ids).logits).abs().max() < 1e-4
    prompt, out, cache = tokens(model, 1, 6), [], model.make_cache(1, 64)
    logits = model(prompt, cache=cache, last_only=True)
    for _ in range(50):
        out.append(logits[0, -1].argmax().item()); logits = model(torch.tensor([out[-1:]]), cache=cache)
    assert twin.generate(prompt, max_new_tokens=50, do_sample=False, eos_token_id=-1)[0, 6:].tolist() == out
    back, back_tokenizer = hf.load(tmp_path / "out")
    assert back.config == model.config and torch.equal(back(ids), model(ids)) and back_tokenizer.fingerprint == tokenizer.fingerprint


def test_transformers_gives_the_same_ids_text_and_conversations(tokenizer, transformers, tmp_path):
    theirs = transformers.AutoTokenizer.from_pretrained(hf.save(lively(depth=1, n_embd=32, vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "out"))
    for text in ("", " ", "The cat's tail, 1234567.\r\n\r\n\t x  y", "naïve 東京🙂\u0085\u00a0\u001c\u2028z", "a" * 200):
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
    talk = [dict(role="system", content="Be brief."), dict(role="user", content=" 2+2? "), dict(role="assistant", content="4"), dict(role="user", content="3+3?"),
            dict(role="assistant", content=[dict(type="python", text="3+3"), dict(type="python_output", text="6"), dict(type="text", text="6")])]
    assert theirs.apply_chat_template(talk, tokenize=True, return_dict=False) == tokenizer.render_conversation(talk)[0]
    assert theirs.apply_chat_template(talk[:-1], tokenize=True, add_generation_prompt=True, return_dict=False) == tokenizer.render_for_completion(talk)


@pytest.mark.parametrize("change, said", [(dict(hidden_act="gelu"), "hidden_act"), (dict(model_type="llama"), "model_type"), (dict(tie_word_embeddings=True), "tie_word_embeddings"),
                                          (dict(intermediate_size=100), "intermediate_size"), (dict(num_hidden_layers=2), "is missing"), (dict(vocab_size=301), "has shape")])
def test_a_folder_of_another_model_is_refused_by_name(change, said, tokenizer, tmp_path):
    import json
    folder = hf.save(lively(depth=1, n_embd=32, vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(NanochatError, match=said): hf.load(folder)


@pytest.mark.parametrize("switch", ["smear", "value_embeddings"])
def test_export_refuses_what_transformers_cannot_express(tokenizer, tmp_path, switch):
    model = lively(depth=1, n_embd=32, vocab_size=tokenizer.vocab_size, **{switch: True})
    with pytest.raises(NanochatError, match=f"transformers' NanoChat has no {switch}"): hf.save(model, tokenizer, tmp_path / "out")


def test_export_never_touches_a_folder_with_files_in_it(tokenizer, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(NanochatError, match="not empty"): hf.save(lively(depth=1, n_embd=32, vocab_size=tokenizer.vocab_size), tokenizer, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
