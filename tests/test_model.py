"""The model against an independent implementation, against itself with a cache, compiled, and at the sizes of the recipe."""
import math

import pytest
import torch

from nanochat import gpt, hf
from nanochat.attention import KVCache
from nanochat.common import NanochatError
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer

SIZES = [dict(depth=1, n_embd=32, n_head=2, n_kv_head=2), dict(depth=3, n_embd=64, n_head=4, n_kv_head=2),
         dict(depth=4, n_embd=128, n_head=2, n_kv_head=1), dict(depth=5, vocab_size=300), dict(depth=2, n_embd=48, n_head=3, n_kv_head=3, rope_base=500.0, softcap=0.0)]


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


@pytest.mark.parametrize("wrong", [dict(n_head=3), dict(n_kv_head=3), dict(vocab_size=0), dict(n_layer=0)])
def test_sizes_that_do_not_fit_are_refused(wrong):
    with pytest.raises(NanochatError): GPTConfig(**dict(dict(n_embd=64, n_head=4, n_kv_head=2), **wrong))


def test_loss_in_chunks_equals_loss_at_once(monkeypatch):
    model, results = lively(**SIZES[1]), []
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


def test_no_token_sees_its_future():
    model = lively(**SIZES[1])
    ids = tokens(model, 1, 16); other = ids.clone(); other[0, 9:] = tokens(model, 1, 7)
    with torch.no_grad(): assert torch.equal(model(ids)[:, :9], model(other)[:, :9])


def test_bfloat16_keeps_float32_masters_and_stays_close():
    model = lively(**SIZES[1]); ids = tokens(model, 2, 32)
    exact = model(ids).detach()
    model.compute_dtype = torch.bfloat16
    loss = model(ids, ids); loss.backward()
    assert loss.dtype == torch.float32 == model.lm_head.weight.grad.dtype
    assert (model(ids) - exact).abs().mean() < 0.1
    cast = model(ids).detach()
    model.to_inference()
    assert model.lm_head.weight.dtype == torch.bfloat16 and not model.lm_head.weight.requires_grad
    assert torch.equal(model(ids), cast)  # casting once or at every use is the same


@pytest.mark.slow
def test_training_path_compiles_to_one_graph_with_the_same_loss_and_gradients():
    model = lively(**SIZES[1])
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


def test_export_never_touches_a_folder_with_files_in_it(tokenizer, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(NanochatError, match="not empty"): hf.save(lively(depth=1, n_embd=32, vocab_size=tokenizer.vocab_size), tokenizer, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
