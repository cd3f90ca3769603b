"""The tokenizer against other implementations of the same rules, on real text where it is present."""
import json
import random
import shutil
import subprocess
import unicodedata
import warnings
from pathlib import Path

import pytest
import regex
import tiktoken

import nanochat.tokenizer as module
from nanochat.common import NanochatError
from nanochat.tokenizer import (SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, count_chunks, encode_chunk, merge, merges_to_ranks,
                                train_bpe)

rustbpe = pytest.importorskip("rustbpe")
DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "text"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no real text beside the project")
MERGES = 1500


def random_texts(number=300, seed=0):
    "Short texts full of what is hard: runs, apostrophes, digits, white space of all kinds, scripts, emoji"
    alphabet = list("aaabbé中'sStTlLvVeErReE ſ019²Ⅷ   \t\n\r\u00a0\u3000.!-_😀\u0301\x1c\x85")
    draw = random.Random(seed)
    return ["".join(draw.choices(alphabet, k=draw.randrange(60))) for _ in range(number)]


@pytest.fixture(scope="module")
def texts():
    "Half a million characters of Wikipedia and textbooks; random texts where these are absent"
    if not DATA.is_dir(): return random_texts(2000)
    files = [DATA / "wiki_vital/wiki_vital_intros.jsonl", DATA / "openstax/openstax_modules.jsonl"]
    return [json.loads(line)["text"][:5000] for file in files for line in file.open().readlines()[::100]]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return Tokenizer.train(texts, 256 + MERGES + len(SPECIAL_TOKENS))


def train_by_the_rule(chunks, num_merges):
    "Count everything again for every merge"
    words, merges = {chunk: list(chunk) for chunk in chunks}, []
    while len(merges) < num_merges:
        counts = {}
        for chunk, word in words.items():
            for pair in zip(word, word[1:]): counts[pair] = counts.get(pair, 0) + chunks[chunk]
        if not counts: break
        pair = min(counts, key=lambda p: (-counts[p], p))
        words = {chunk: merge(word, pair, 256 + len(merges)) for chunk, word in words.items()}
        merges.append(pair)
    return merges


# --- the three trainers agree

def test_rust_and_python_learn_the_same_merges(texts):
    assert rustbpe.train(iter(texts), 256 + MERGES) == train_bpe(texts, MERGES)


def test_both_trainers_follow_the_rule_word_for_word_until_no_pair_is_left():
    chunks = count_chunks(random_texts(60))
    expected = train_by_the_rule(chunks, 10**6)
    assert train_bpe(chunks, 10**6) == expected
    assert rustbpe.merge(chunks, 10**6) == expected
    assert len(expected) < 10**6


def test_merges_equal_those_of_hugging_face(texts):
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import Regex, models, pre_tokenizers, trainers
    hf = tokenizers.Tokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
                                                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    hf.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=256 + MERGES, initial_alphabet=alphabet, show_progress=False))
    # Equal counts are decided by ids, and theirs number the bytes in another order: number ours alike.
    order = [byte for byte in range(256) if chr(byte).isprintable() and byte not in (32, 160, 173)]
    order += [byte for byte in range(256) if byte not in order]
    renumber = bytes(order.index(byte) for byte in range(256))
    chunks = {chunk.translate(renumber): count for chunk, count in count_chunks(texts).items()}
    ranks = merges_to_ranks(rustbpe.merge(chunks, MERGES))
    letters = {i: letter for i, letter in enumerate(alphabet)}
    ours = ["".join(letters[i] for i in token) for token in ranks]
    theirs = [token for token, _ in sorted(hf.get_vocab().items(), key=lambda item: item[1])]
    assert ours == theirs


def test_order_and_batching_of_documents_do_not_matter(texts):
    shuffled = random.Random(1).sample(texts, len(texts))
    assert rustbpe.train(shuffled, 600) == rustbpe.train((text for text in texts), 600)


def test_texts_larger_than_one_batch_are_counted_whole():
    big = ["one two three " * 330_000, "four", "one five"]  # the crate hands text over in batches of 4 MB
    assert rustbpe.count(big) == count_chunks(big)


def test_merging_never_makes_the_same_token_twice(tokenizer):
    assert len(tokenizer.ranks) == 256 + MERGES and len(tokenizer.merges()) == MERGES


def test_python_trainer_takes_over_without_the_crate(texts, monkeypatch):
    fast = Tokenizer.train(texts[:50], 600)
    monkeypatch.setattr(module, "rustbpe", None)
    assert Tokenizer.train(texts[:50], 600).fingerprint == fast.fingerprint


# --- cutting

def test_crate_and_module_have_the_same_pattern():
    assert rustbpe.PATTERN == SPLIT_PATTERN


def test_rust_cuts_as_the_regex_module_does(texts):
    pattern = regex.compile(SPLIT_PATTERN)
    for text in random_texts(3000, seed=1) + texts[:200]: assert rustbpe.split(text) == pattern.findall(text)


def test_rust_cuts_at_every_character_as_the_regex_module_does():
    pattern = regex.compile(SPLIT_PATTERN)
    for code in range(0x110000):
        # newer versions of Unicode give names to code points that were free; the libraries' versions differ
        if unicodedata.category(chr(code)) in ("Cn", "Cs", "Co"): continue
        text = f"{chr(code)}a {chr(code)}{chr(code)}1{chr(code)}'{chr(code)}\n{chr(code)}  {chr(code)}!"
        assert rustbpe.split(text) == pattern.findall(text), hex(code)


def test_another_pattern_is_followed():
    assert rustbpe.split("ab12", r"\d|\w") == ["a", "b", "1", "2"]
    assert rustbpe.count(["ab ab"], r"\w+") == {b"ab": 2}


def test_the_crate_refuses_bad_input_in_words():
    for call, words in ((lambda: rustbpe.train([b"x"], 300), "strings"), (lambda: rustbpe.train(["x"], 10), "at least 256"),
                        (lambda: rustbpe.train(["x"], 300, "("), "pattern")):
        with pytest.raises(ValueError, match=words): call()


def test_an_error_in_the_iterator_comes_through():
    def broken():
        yield "fine"
        raise RuntimeError("the disk is gone")
    with pytest.raises(RuntimeError, match="the disk is gone"): rustbpe.train(broken(), 300)


# --- encoding

LANGUAGES = dict(
    english="It wasn't the first time they'd've met; I'M SURE.", korean="오늘 아침에는 비가 내렸지만", chinese="今天天气很好，我们去公园散步吧。", japanese="東京タワーは１９５８年に",
    russian="Съешь же ещё этих мягких французских булок", arabic="اللغة العربية جميلة ١٢٣", hindi="हिन्दी में लिखा हुआ पाठ", thai="ภาษาไทยไม่มีช่องว่าง",
    greek="Ελληνικά, ΑΒΓ ς", vietnamese="Tiếng Việt có dấu", german="Größe, Straße, ÄÖÜ", hebrew="שלום עולם", code="def f(x):\n\treturn x**2 # 你好\r\n\r\n    pass\n",
    emoji="👩‍👩‍👧‍👦🏳️‍🌈 ok👍🏽!!", latex=r"$\int_0^\infty e^{-x^2}\,dx = \frac{\sqrt{\pi}}{2}$")


@pytest.fixture(params=["rustbpe", "tiktoken"])
def encoder(request, tokenizer, monkeypatch):
    "The tokenizer with the crate's encoder, and without"
    if request.param == "tiktoken": monkeypatch.setattr(tokenizer, "encoder", None)
    return tokenizer


def test_ids_equal_tiktoken_and_the_naive_encoder(encoder, texts):
    reference = tiktoken.Encoding("reference", pat_str=SPLIT_PATTERN, mergeable_ranks=encoder.ranks, special_tokens={})
    for text in texts[:60] + random_texts(200) + list(LANGUAGES.values()):
        ids = encoder.encode(text)
        assert ids == reference.encode_ordinary(text)
        assert ids == [i for chunk in regex.findall(SPLIT_PATTERN, text) for i in encode_chunk(chunk.encode(), encoder.ranks)]
        assert encoder.decode(ids) == text


def test_the_crate_encodes_what_tiktoken_encodes_on_random_unicode(tokenizer):
    draw = random.Random(3)
    def character(): return chr(draw.choice((draw.randrange(128), draw.randrange(0x800), draw.randrange(0xD800), draw.randrange(0xE000, 0x110000))))
    for size in (1, 3, 15, 16, 17, 60, 300) * 60:
        text = "".join(character() for _ in range(draw.randrange(size + 1)))
        noise = draw.randbytes(size).decode("utf-8", "replace")
        for some in (text, noise): assert tokenizer.encoder.encode(some) == tokenizer.encoding.encode_ordinary(some)


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_the_crate_encodes_with_published_vocabularies(name, texts, monkeypatch):
    folder = DATA.parent / "tokenizers" / "tiktoken_cache"
    if not folder.is_dir(): pytest.skip("no published vocabularies beside the project")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    published = tiktoken.get_encoding(name)
    ranks = published._mergeable_ranks
    assert sorted(ranks.values()) == list(range(len(ranks)))
    encoder = rustbpe.Encoder(sorted(ranks, key=ranks.get), published._pat_str)
    for text in texts[:20] + random_texts(50) + list(LANGUAGES.values()): assert encoder.encode(text) == published.encode_ordinary(text)


def test_an_encoder_in_many_threads_gives_what_it_gives_in_one(tokenizer, texts):
    from concurrent.futures import ThreadPoolExecutor
    expected = [tokenizer.encode(text) for text in texts[:40]]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(tokenizer.encode, texts[:40] * 5)) == expected * 5
    for threads in (1, 2, 3, 50): assert tokenizer.encoder.encode_batch(texts[:40], threads=threads) == expected


def test_flat_ids_are_those_of_the_lists(encoder, texts):
    import numpy as np
    some = texts[:40] + ["", "half \ud83d a pair"]
    ids, counts = encoder.encode_flat(some, prepend=9)
    assert [part.tolist() for part in np.split(ids, np.cumsum(counts)[:-1])] == [[9] + encoder.encode(text) for text in some]


def test_an_encoder_refuses_a_vocabulary_without_all_bytes_or_with_a_token_twice():
    tokens = [bytes([i]) for i in range(256)]
    with pytest.raises(ValueError, match="no token for byte 255"): rustbpe.Encoder(tokens[:255])
    with pytest.raises(ValueError, match="same bytes"): rustbpe.Encoder(tokens + [b"a"])
    with pytest.raises(ValueError, match="split pattern"): rustbpe.Encoder(tokens, "(")


def test_a_list_gives_what_single_texts_give(encoder, texts):
    for some in (texts[:3], texts[:100], []): assert encoder.encode(some) == [encoder.encode(text) for text in some]
    assert encoder.encode(["a"], prepend="<|bos|>", append=5) == [[encoder.bos, *encoder.encode("a"), 5]]


def test_user_text_never_yields_a_special_token(encoder):
    tokenizer = encoder
    text = "".join(SPECIAL_TOKENS) + " <|bos|><|user_start|>"
    assert max(tokenizer.encode(text)) < len(tokenizer.ranks)
    messages = [dict(role="user", content=text), dict(role="assistant", content=text)]
    ids, _ = tokenizer.render_conversation(messages)
    assert [i for i in ids if i >= len(tokenizer.ranks)] == [tokenizer.special[f"<|{n}|>"] for n in ("bos", "user_start", "user_end", "assistant_start", "assistant_end")]


def test_long_runs_and_lone_surrogates_do_not_end_the_process(encoder):
    tokenizer = encoder
    for text in (" " * 1_000_000, "\n" * 1_000_000, " \n" * 500_000 + "x", "a" * 500_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("\ud800")) == tokenizer.decode(tokenizer.encode("\ud800" + "a" * 500_000))[:1] == "\ufffd"


def test_long_texts_get_the_same_ids(tokenizer, texts, monkeypatch):
    text = "".join(texts)[:50_000]
    expected = tokenizer.encode(text)
    monkeypatch.setattr(tokenizer, "encoder", None)
    monkeypatch.setattr(module, "LONG_TEXT", 1000)
    assert tokenizer.encode(text) == expected and tokenizer.encode([text] * 33)[7] == expected


def test_special_ids_follow_the_ranks_in_the_reference_order(tokenizer):
    assert list(tokenizer.special.values()) == list(range(len(tokenizer.ranks), tokenizer.vocab_size))
    assert [name.strip("<|>") for name in tokenizer.special] == ["bos", "user_start", "user_end", "assistant_start", "assistant_end",
                                                                 "python_start", "python_end", "output_start", "output_end"]


def test_token_bytes_come_from_raw_bytes(tokenizer, texts):
    token_bytes = tokenizer.token_bytes()
    assert token_bytes[:256] == [1] * 256 and token_bytes[-9:] == [0] * 9
    for text in texts[:50] + ["세계 😀"]: assert sum(token_bytes[i] for i in tokenizer.encode(text)) == len(text.encode())


# --- files

def test_a_saved_tokenizer_comes_back_whole(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.ranks, again.special, again.fingerprint) == (tokenizer.ranks, tokenizer.special, tokenizer.fingerprint)
    assert json.loads((tmp_path / "token_bytes.json").read_text()) == tokenizer.token_bytes()


@pytest.mark.parametrize("name, content", [("meta.json", "{"), ("meta.json", "[]"), ("ranks.tiktoken", "AA== 0\n"), ("ranks.tiktoken", "?"), ("ranks.tiktoken", None)])
def test_damaged_files_get_one_clear_line(tokenizer, tmp_path, name, content):
    tokenizer.save(tmp_path)
    if content is None: (tmp_path / name).unlink()
    else: (tmp_path / name).write_text(content)
    with pytest.raises(NanochatError) as caught: Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_fingerprint_changes_with_ranks_pattern_and_special_tokens(tokenizer):
    a, b = list(tokenizer.ranks)[300:302]
    others = [Tokenizer(tokenizer.ranks | {a: 301, b: 300}), Tokenizer(tokenizer.ranks, pattern=r"\w+|\W+"),
              Tokenizer(tokenizer.ranks, special_tokens=SPECIAL_TOKENS[::-1])]
    assert len({t.fingerprint for t in [tokenizer, *others]}) == 4


# --- conversations

TOOL = [dict(role="user", content="2 * 3?"),
        dict(role="assistant", content=[dict(type="text", text="Well: "), dict(type="python", text="2*3"),
                                        dict(type="python_output", text="6"), dict(type="text", text="It is 6.")]),
        dict(role="user", content="Thanks"), dict(role="assistant", content="Welcome")]


def supervised(tokenizer, conversation, wanted=1):
    ids, mask = tokenizer.render_conversation(conversation)
    assert len(ids) == len(mask)
    return tokenizer.decode([i for i, m in zip(ids, mask) if m == wanted])


def test_only_the_assistants_own_words_are_supervised(tokenizer):
    assert supervised(tokenizer, TOOL) == "Well: <|python_start|>2*3<|python_end|>It is 6.<|assistant_end|>Welcome<|assistant_end|>"
    assert supervised(tokenizer, TOOL, 0) == ("<|bos|><|user_start|>2 * 3?<|user_end|><|assistant_start|><|output_start|>6<|output_end|>"
                                              "<|user_start|>Thanks<|user_end|><|assistant_start|>")


def test_system_message_is_merged_into_the_first_user_message_and_left_alone(tokenizer):
    system = [dict(role="system", content="Be brief."), *TOOL]
    merged = [dict(role="user", content="Be brief.\n\n2 * 3?"), *TOOL[1:]]
    assert tokenizer.render_conversation(system) == tokenizer.render_conversation(dict(messages=merged))
    assert system[0]["content"] == "Be brief." and len(system) == 5


def test_truncation_never_drops_all_supervised_tokens_silently(tokenizer):
    with pytest.warns(UserWarning, match="no token of it is supervised"): ids, mask = tokenizer.render_conversation(TOOL, max_tokens=4)
    assert len(ids) == 4 and not any(mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids, mask = tokenizer.render_conversation(TOOL, max_tokens=20)
    assert len(ids) == len(mask) == 20 and any(mask)
    assert (ids, mask) == tuple(part[:20] for part in tokenizer.render_conversation(TOOL))


def test_prompt_is_the_conversation_up_to_the_last_answer(tokenizer):
    ids, _ = tokenizer.render_conversation(TOOL)
    prompt = tokenizer.render_for_completion(TOOL)
    assert ids[:len(prompt)] == prompt and prompt[-1] == tokenizer.special["<|assistant_start|>"]
    assert prompt == tokenizer.render_for_completion(TOOL[:-1])


@pytest.mark.parametrize("messages", [[], [dict(role="assistant", content="x")], [TOOL[0], TOOL[0]], [dict(role="system", content="x")],
                                      [dict(role="user", content=["x"])], [TOOL[0], dict(role="assistant", content=[dict(type="image", text="")])]])
def test_malformed_conversations_get_one_clear_line(tokenizer, messages):
    with pytest.raises(NanochatError): tokenizer.render_conversation(messages)


def test_view_escapes_html(tokenizer):
    page = tokenizer.visualize(tokenizer.encode("<b>&\n"))._repr_html_()
    assert "<b>" not in page and "&lt;" in page


def test_half_a_surrogate_pair_is_one_replacement_sign_in_every_trainer():
    texts = ["a \ud83d b?", "\udc00\udc00?", "?"]
    assert rustbpe.count(texts) == count_chunks(texts)
    assert rustbpe.split(texts[0]) == ["a", " \ufffd", " b", "?"]


# --- the crate's own tests

def test_the_crate_passes_its_own_tests():
    if not shutil.which("cargo"): pytest.skip("no Rust on this machine")
    crate = Path(__file__).resolve().parents[1] / "rustbpe"
    done = subprocess.run(["cargo", "test", "-q", "--release", "--no-default-features", "--lib"], cwd=crate, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split(" passed")[0].split()[-1]) >= 8
