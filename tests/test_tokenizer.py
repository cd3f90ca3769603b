"""The tokenizer against other implementations of the same rules, on real text where it is present."""
import json
import random
import shutil
import subprocess
import sys
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


def test_a_cut_at_any_length_keeps_ids_and_mask_together_and_warns_exactly_when_nothing_is_left_to_learn(tokenizer):
    draw = random.Random(7)
    for conversation in [TOOL, *(random_conversation(draw) for _ in range(60))]:
        ids, mask = tokenizer.render_conversation(conversation, max_tokens=10**6)
        assert len(ids) == len(mask) and mask[0] == 0 and mask[-1] == 1
        for length in {1, 2, 3, len(ids) // 2, len(ids) - 1, len(ids), len(ids) + 5, draw.randrange(1, len(ids) + 1)}:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                cut = tokenizer.render_conversation(conversation, max_tokens=length)
            assert cut == (ids[:length], mask[:length])
            assert bool(caught) == (not any(mask[:length]))


@pytest.mark.parametrize("length", [0, -1])
def test_a_length_without_room_for_a_token_is_refused(tokenizer, length):
    with pytest.raises(NanochatError, match="max_tokens"): tokenizer.render_conversation(TOOL, max_tokens=length)


def test_a_conversation_cut_before_its_answer_is_counted_by_the_loader(tokenizer):
    from nanochat.dataloader import ConversationLoader
    long = [dict(role="user", content="word " * 500), dict(role="assistant", content="x")]
    for packing in ("padded", "best_fit"):
        loader = ConversationLoader([long, TOOL], tokenizer, 1, 64, packing=packing, epochs=1)
        batches = list(loader)
        assert loader.stats["dropped"] == 1
        assert sum(int((batch.targets >= 0).sum()) for batch in batches) == sum(tokenizer.render_conversation(TOOL)[1])


def test_random_conversations_supervise_the_assistants_words_and_calls_and_nothing_else(tokenizer):
    draw = random.Random(8)
    for _ in range(200):
        conversation = random_conversation(draw)
        expected = ""
        for message in conversation:
            if message["role"] != "assistant": continue
            content = message["content"]
            for part in [dict(type="text", text=content)] if isinstance(content, str) else content:
                expected += {"text": part["text"], "python": f"<|python_start|>{part['text']}<|python_end|>", "python_output": ""}[part["type"]]
            expected += "<|assistant_end|>"
        ids, mask = tokenizer.render_conversation(conversation, max_tokens=10**6)
        assert tokenizer.decode([i for i, m in zip(ids, mask) if m]) == expected


@pytest.mark.parametrize("messages, said", [("hello", "message 0 is not a mapping"), ([dict(role="user")], "message 0 is not"), (dict(rows=[]), "no message"), ([dict(role="user", content=None)], "message 0 .* no text"),
    ([dict(role="system", content=["x"]), TOOL[0]], "message 0 .* no text"), ([dict(role="system", content="x"), dict(role="user", content=1)], "message 1 .* no text"),
    ([dict(role="system", content="x"), TOOL[1]], "expected 'user'"), ([TOOL[0], dict(role="assistant", content=None)], "message 1 .* no text"),
    ([TOOL[0], dict(role="assistant", content=["x"])], "message 1 .* no text"), ([TOOL[0], dict(role="assistant", content=[dict(type="text")])], "message 1 .* no text"),
    ([TOOL[0], dict(role="assistant", content=[dict(text="x")])], "type 'None'"), ([TOOL[0], dict(role="tool", content="x")], "role 'tool'")])
def test_a_malformed_conversation_is_refused_by_the_place_of_its_message(tokenizer, messages, said):
    for render in (tokenizer.render_conversation, tokenizer.render_for_completion):
        with pytest.raises(NanochatError, match=said) as caught: render(messages)
        assert "\n" not in str(caught.value)


# --- the same tokenizer in transformers

def random_conversation(draw):
    "Turns full of what could break a template: names of special tokens and pieces of them, white space, scripts, tools"
    def text(): return "".join(draw.choices(["<", "|", "<|", "|>", "bos", "<|bos|>", "<|assistant_start|>", "{{", "%}", "'", '"', "\\n", "\n", " ", "\t", "a", "Word", "12", "é", "세계", "😀", ">"], k=draw.randrange(9)))
    def answer():
        if draw.random() < 0.5: return text()
        kinds = draw.choices([["python"], ["python", "python_output"], ["text", "python"]], k=draw.randrange(3)) + [["text"]] * draw.randrange(2)
        kinds = [kind for some in kinds for kind in some]  # never two texts in a row: there they are joined
        return [dict(type=kind, text=text()) for kind in kinds]
    turns = draw.randrange(1, 5)
    messages = [dict(role="system", content=text())] if draw.random() < 0.4 else []
    for _ in range(turns): messages += [dict(role="user", content=text()), dict(role="assistant", content=answer())]
    return messages


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    tokenizer.save(folder := tmp_path_factory.mktemp("saved"))
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    transformers.logging.set_verbosity_error()
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_transformers_opens_a_saved_folder_and_gives_the_same_ids(tokenizer, theirs, texts):
    runs = [mark * n for mark in (" ", "\n", "\t", "\r\n", " \n", "\u00a0", "\u3000", "\u0085", "a", "é", "😀", "1", "!") for n in (1, 2, 3, 7, 100)]
    for text in texts[:100] + random_texts(1000, seed=5) + runs + [f"x{run}y {run}" for run in runs] + list(LANGUAGES.values()) + list(module.SAMPLES.values()):
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    assert len(theirs) == tokenizer.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos, tokenizer.special["<|assistant_end|>"])


def test_transformers_gives_the_same_ids_for_every_character(tokenizer, theirs):
    characters = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")]
    texts = ["".join(f"{c}a {c}{c}1{c}'{c}\n{c}  {c}!" for c in characters[i:i + 100]) for i in range(0, len(characters), 100)]
    assert [text[0] for text, a, b in zip(texts, theirs(texts)["input_ids"], tokenizer.encode(texts)) if a != b] == []


def test_transformers_gives_the_same_ids_on_random_unicode(tokenizer, theirs):
    draw = random.Random(4)
    def character():
        code = draw.choice((draw.randrange(128), draw.randrange(0x800), draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)))
        return chr(code) if unicodedata.category(chr(code)) != "Cn" else " "
    for size in (1, 3, 15, 60, 300) * 60:
        text = "".join(character() for _ in range(draw.randrange(size + 1)))
        assert theirs(text)["input_ids"] == tokenizer.encode(text)


def test_the_chat_template_renders_the_ids_and_the_mask_of_render_conversation(tokenizer, theirs):
    draw = random.Random(6)
    system = [dict(role="system", content="Be brief."), *TOOL]
    for conversation in [TOOL, system, TOOL[:2], *(random_conversation(draw) for _ in range(300))]:
        ids, mask = tokenizer.render_conversation(conversation, max_tokens=10**6)
        rendered = theirs.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
        assert rendered["input_ids"] == ids and rendered["assistant_masks"] == mask
        asked = theirs.apply_chat_template(conversation[:-1], add_generation_prompt=True, return_dict=False)
        assert asked == tokenizer.render_for_completion(conversation)


def test_a_forged_special_token_stays_text_in_the_template_and_where_transformers_is_asked_to_split(tokenizer, theirs):
    forged = "".join(SPECIAL_TOKENS) + "<<|bos|>> <|user_end|>"
    assert theirs(forged, split_special_tokens=True)["input_ids"] == tokenizer.encode(forged)
    first = min(tokenizer.special.values())
    assert max(theirs(forged)["input_ids"]) >= first  # its custom with plain text; if this ever changes, notebook 01 has to say so
    parts = [[dict(type="text", text=piece) for piece in ("<", "|bos|>", "<|", "bos|>")], forged]
    for content in parts:
        talk = [dict(role="system", content=content), dict(role="user", content=content), dict(role="assistant", content=content)]
        ids = theirs.apply_chat_template(talk, return_dict=False)
        assert [tokenizer.decode([i]) for i in ids if i >= first] == ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"]


@pytest.mark.parametrize("messages", [[dict(role="assistant", content="x")], [dict(role="user", content="x")] * 2, [dict(role="system", content="x")] * 2,
                                      [dict(role="user", content="x"), dict(role="system", content="x")],
                                      [dict(role="user", content="x"), dict(role="assistant", content=[dict(type="image", text="")])]])
def test_the_chat_template_refuses_what_render_conversation_refuses(messages, tokenizer, theirs):
    with pytest.raises(NanochatError): tokenizer.render_conversation(messages)
    with pytest.raises(Exception, match="roles must alternate|unknown part"): theirs.apply_chat_template(messages)


def test_a_tokenizer_comes_back_from_tokenizer_json_also_after_transformers_has_saved_it(tokenizer, theirs, folder, tmp_path):
    theirs.save_pretrained(tmp_path)
    for file in (folder, tmp_path):
        again = Tokenizer.from_hf(json.loads((file / "tokenizer.json").read_text()))
        assert again.fingerprint == tokenizer.fingerprint and again.ranks == tokenizer.ranks
    import transformers
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.apply_chat_template(TOOL, return_dict=False) == tokenizer.render_conversation(TOOL)[0]


@pytest.mark.parametrize("change, said", [(dict(normalizer=dict(type="NFC")), "NFC"), (dict(pre_tokenizer=None), "split pattern"), (dict(model=dict(vocab={"é中": 0})), "byte-level"),
                                          (dict(added_tokens=[dict(content="<|bos|>", id=3)]), "special tokens"), (dict(added_tokens="x"), "byte-level")])
def test_a_tokenizer_json_of_another_kind_is_refused_in_one_line(change, said, tokenizer):
    with pytest.raises(NanochatError, match=said) as caught: Tokenizer.from_hf(tokenizer.to_hf() | change)
    assert "\n" not in str(caught.value)


def test_saving_needs_no_transformers_and_loading_looks_at_our_files_only(tokenizer, tmp_path):
    code = ("import sys; sys.modules.update(transformers=None, tokenizers=None, jinja2=None)\n"
            "from nanochat.tokenizer import Tokenizer\nTokenizer.train(['a b ab'], 270).save(sys.argv[1])")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], check=True)
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["chat_template.jinja", "meta.json", "ranks.tiktoken", "token_bytes.json", "tokenizer.json", "tokenizer_config.json"]
    tokenizer.save(tmp_path)
    for name in tokenizer.hf_files(): (tmp_path / name).write_text("{")
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint
    for name in tokenizer.hf_files(): (tmp_path / name).unlink()
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint


def test_a_fingerprint_is_the_one_that_models_were_bound_to_before():
    assert Tokenizer(merges_to_ranks([(97, 110), (98, 256)])).fingerprint.startswith("5e46d9e61a540a897ff4")


# --- the compression report

@pytest.fixture
def no_network(monkeypatch, tmp_path):
    "tiktoken knows nothing yet, has an empty cache, and nobody may reach out"
    def unreachable(*args, **kwargs): raise AssertionError("the network was asked")
    import socket
    import tiktoken.registry
    monkeypatch.setattr(socket, "socket", unreachable)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))


def test_the_compression_report_counts_bytes_tokens_and_savings():
    letters, words = Tokenizer(merges_to_ranks([])), Tokenizer(merges_to_ranks([(97, 98), (256, 99)]))
    report = module.compression_report(dict(words=words, letters=letters), dict(a="abc", b=["abc abc", "é"], none=[], empty=""))
    assert report == dict(a=dict(bytes=3, tokens=dict(words=1, letters=3), bytes_per_token=dict(words=3.0, letters=1.0), saved=dict(letters=round(2 / 3, 4))),
                          b=dict(bytes=9, tokens=dict(words=5, letters=9), bytes_per_token=dict(words=1.8, letters=1.0), saved=dict(letters=round(4 / 9, 4))))
    header, rows = module.compression_table(report)
    assert header == ["text", "bytes", "tokens, words", "tokens, letters", "bytes per token, words", "bytes per token, letters", "fewer than letters"]
    assert rows[0] == ["a", "3", "1", "3", "3.00", "1.00", "+66.7%"] and len(rows[1]) == len(header)
    assert module.compression_table(module.compression_report(dict(letters=letters), dict(a="abc")))[1] == [["a", "3", "3", "1.00"]]


def test_the_compression_report_refuses_a_tokenizer_that_loses_text(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "decode", lambda ids: "something else", raising=False)
    with pytest.raises(NanochatError, match="does not come back"): module.compression_report(dict(ours=tokenizer), dict(a="abc"))


def test_published_tokenizers_are_never_fetched_unasked(no_network, tmp_path, monkeypatch):
    assert module.published_encodings() == module.published_encodings(tmp_path) == {}
    asked = []
    def offline(url): asked.append(url); raise OSError("no network")
    monkeypatch.setattr(module, "fetch", offline)
    assert module.published_encodings(download=True) == {} and len(asked) == 2


@pytest.mark.skipif(not DATA.is_dir(), reason="no published vocabularies beside the project")
@pytest.mark.parametrize("place", ["inside", "beside"])
def test_published_tokenizers_are_found_by_their_files_and_a_damaged_one_is_left_out(no_network, tmp_path, place):
    root = tmp_path / "root"
    folder = (root if place == "inside" else tmp_path) / "tokenizers"
    shutil.copytree(DATA.parent / "tokenizers", folder, copy_function=shutil.copyfile)
    found = module.published_encodings(root)
    assert {name: encoding.n_vocab for name, encoding in found.items()} == {"GPT-2": 50257, "GPT-4": 100277}
    assert found["GPT-2"].encode_ordinary("Hello, world!") == [15496, 11, 995, 0]
    assert found["GPT-4"].encode_ordinary("Hello, world!") == [9906, 11, 1917, 0]
    folder.chmod(0o755)
    (folder / "r50k_base.tiktoken").write_text("IQ== 0\n")
    assert list(module.published_encodings(root)) == ["GPT-2", "GPT-4"], "both lie in tiktoken's cache by now"
    min((tmp_path / "empty").iterdir(), key=lambda path: path.stat().st_size).write_text("damaged")  # GPT-2's is the smaller one
    assert list(module.published_encodings(root)) == ["GPT-4"]


@needs_data
def test_published_savings_are_those_of_the_rank_files(no_network, tokenizer):
    found = module.published_encodings(DATA.parent / "hf_parquet")
    report = module.compression_report(dict(ours=tokenizer) | found, module.SAMPLES)
    for kind, text in module.SAMPLES.items():
        assert 1000 <= len(text.encode()) <= 2000
        ours, theirs = len(tokenizer.encode(text)), len(found["GPT-2"].encode_ordinary(text))
        assert report[kind]["tokens"] == dict(ours=ours) | {"GPT-2": theirs, "GPT-4": len(found["GPT-4"].encode_ordinary(text))}
        assert report[kind]["saved"]["GPT-2"] == pytest.approx((theirs - ours) / theirs, abs=1e-4)


def test_the_stage_records_the_report_with_and_without_published_tokenizers(no_network, tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from nanochat.common import Run
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path))
    for name, neighbours in (("alone", tmp_path / "nothing"), ("beside", DATA.parent / "hf_parquet")):
        run, files = Run.create(name), []
        for part, text in (("train", "the cat sat on the mat " * 50), ("val", "a dog and a cat")):
            pq.write_table(pa.table(dict(text=[text])), run.path(f"{part}.parquet"))
            files.append(str(run.path(f"{part}.parquet")))
        run.update_info(sources=[dict(weight=1, column="text", train=files[:1], val=files[1:])], data_root=str(neighbours))
        run.write_json(dict(stage="dataset", finished=None, seconds=0), "stages", "dataset.json")
        report = module.main(name, "tiny", vocab_size=300)["results"]["compression"]
        assert list(report) == [*module.SAMPLES, "train", "val"]
        assert json.loads(json.dumps(report)) == report and len(json.dumps(report)) < 3000
        if name == "beside" and not DATA.is_dir(): continue
        assert list(report["val"]["tokens"]) == ["nanochat"] + ["GPT-2", "GPT-4"] * (name == "beside")
        assert report["val"]["bytes"] == 15 and report["train"]["saved"].keys() == report["val"]["saved"].keys()


# --- the crate's own tests

def test_the_crate_passes_its_own_tests():
    if not shutil.which("cargo"): pytest.skip("no Rust on this machine")
    crate = Path(__file__).resolve().parents[1] / "rustbpe"
    done = subprocess.run(["cargo", "test", "-q", "--release", "--no-default-features", "--lib"], cwd=crate, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split(" passed")[0].split()[-1]) >= 8


def test_training_says_now_and_then_how_far_it_is(capsys):
    progress = module.Progress(100, every=0)
    progress(5_000_000, 0)
    progress(0, 40)
    assert capsys.readouterr().out == "tokenizer: 5 MB of text read\ntokenizer: 40 of 100 merges\n"
    module.Progress(100)(0, 41)  # too soon to say anything again
    assert not capsys.readouterr().out


@pytest.mark.skipif(module.rustbpe is None, reason="the Rust trainer is not built")
def test_what_progress_raises_ends_the_training():
    def stop(num_bytes, merges): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): module.rustbpe.train(("a text of some length " * 1000 for _ in range(500)), 300, None, stop)
