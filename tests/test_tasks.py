"""Tasks on the real published files (where ../shared/data has them) and on hostile input."""
import ast, json, re
from pathlib import Path

import pyarrow as pa, pyarrow.parquet as pq
import pytest

from nanochat import tasks
from nanochat.common import NanochatError
from nanochat.tasks import load_task, Mixture, CustomJSON, permutation, read_conversations, tool_parts

REAL = Path(__file__).resolve().parents[2]/'shared'/'data'/'hf_parquet'
real = pytest.mark.skipif(not REAL.exists(), reason='the real data sets are not here')
PINNED = [4, 1, 6, 2, 3, 0, 7, 5]  # changing this changes which rows every run trains on
SIZES = {('ARC-Easy', 'train'): 2251, ('ARC-Easy', 'validation'): 570, ('ARC-Easy', 'test'): 2376, ('ARC-Challenge', 'train'): 1119,
         ('ARC-Challenge', 'validation'): 299, ('ARC-Challenge', 'test'): 1172, ('MMLU', 'test'): 14042, ('MMLU-aux', 'train'): 8315,
         ('GSM8K', 'train'): 7473, ('GSM8K', 'test'): 1319, ('HumanEval', 'test'): 164, ('SmolTalk', 'train'): 9318, ('SmolTalk', 'test'): 400}


@real
@pytest.mark.parametrize('name,split', SIZES)
def test_every_published_row_becomes_a_sound_conversation_once(name, split):
    task = load_task(name, split, REAL)
    assert len(task) == SIZES[name, split]
    assert sorted(task.order) == list(range(len(task)))
    for conversation in task:
        assert tasks.conversation_problem(conversation['messages']) is None


@real
@pytest.mark.parametrize('name', ['ARC-Easy', 'ARC-Challenge', 'MMLU', 'GSM8K'])
def test_the_published_answer_is_graded_right_and_others_wrong(name):
    task = load_task(name, 'test', REAL)
    for conversation in task if name == 'GSM8K' else task[:500]:
        answer = tasks.message_text(conversation['messages'][-1]['content'])
        assert task.evaluate(conversation, answer)
        if task.kind == 'categorical':
            assert [task.evaluate(conversation, letter) for letter in conversation['letters']].count(True) == 1
        else:
            assert not task.evaluate(conversation, '#### 987654321') and not task.evaluate(conversation, '')
            assert task.evaluate(conversation, '#### ' + answer.split('####')[-1].strip().replace(',', ''))


@real
def test_letters_agree_with_the_native_answer_key_even_where_labels_are_numbers():
    rows = {row['question']: row for row in pq.read_table(REAL/'allenai/ai2_arc/ARC-Easy/validation-00000-of-00001.parquet').to_pylist()}
    numbered = 0
    for conversation in load_task('ARC-Easy', 'validation', REAL):
        text, letter = conversation['messages'][0]['content'], conversation['messages'][1]['content']
        row = rows[text.split('\n- ')[0].removeprefix('Multiple Choice question: ')] if text.count('\n- ') == len(conversation['letters']) else None
        if row is None: continue
        choice = row['choices']['text'][row['choices']['label'].index(row['answerKey'])]
        assert f'- {choice}={letter}\n' in text
        numbered += row['choices']['label'][0] == '1'
    assert numbered >= 20


@real
@pytest.mark.parametrize('name', ['ARC-Easy', 'MMLU', 'GSM8K'])
def test_a_question_has_nothing_that_all_questions_have(name):
    task = load_task(name, 'test', REAL, stop=300)
    for conversation in task:
        question, whole = task.question(conversation), conversation['messages'][-2]['content']
        assert question and question in whole and 'Multiple Choice' not in question and 'Respond only' not in question
        if task.kind == 'categorical': assert question.count('\n- ') >= len(conversation['letters']) and len(question) == len(whole) - len('Multiple Choice question: \n\nRespond only with the letter of the correct answer.')


@real
def test_mmlu_auxiliary_is_the_same_nested_or_flat(tmp_path):
    nested = load_task('MMLU-aux', 'train', REAL)
    flat_file = tmp_path/'cais/mmlu/all/auxiliary_train-00000-of-00001.parquet'
    flat_file.parent.mkdir(parents=True)
    flat_file.symlink_to(REAL/'cais/mmlu/all/auxiliary_train-00000-of-00001.parquet')
    flat = load_task('MMLU-aux', 'train', tmp_path)
    assert all(nested[i] == flat[i] for i in range(0, 8315, 97))


@real
def test_gsm8k_marks_become_tool_calls_without_losing_a_character():
    for row in pq.read_table(REAL/'openai/gsm8k/main/train-00000-of-00001.parquet').to_pylist():
        parts = tasks.tool_parts(row['answer'])
        text = ''.join(f'<<{a["text"]}={b["text"]}>>' if a['type'] == 'python' else a['text']
                       for a, b in zip(parts, parts[1:] + [None]) if a['type'] != 'python_output')
        assert text == row['answer']


@real
def test_the_calculator_agrees_with_the_marks_of_gsm8k():
    tools = pytest.importorskip('nanochat.tools')
    asked = wrong = refused = 0
    for conversation in load_task('GSM8K', 'train', REAL, stop=1500):
        parts = conversation['messages'][-1]['content']
        for call, output in zip(parts, parts[1:]):
            if call['type'] != 'python': continue
            asked += 1
            result = tools.calculator(call['text'])
            refused += result is None
            try: wrong += result is not None and abs(float(result) - float(output['text'].replace(',', ''))) > .01 * abs(float(result)) + 1e-9
            except ValueError: pass  # a few results are fractions such as 1/2
    assert asked > 4000 and refused < .03 * asked and wrong < .02 * asked


@real
@pytest.mark.slow
def test_humaneval_accepts_every_canonical_solution_and_no_empty_one():
    tools = pytest.importorskip('nanochat.tools')
    task = load_task('HumanEval', 'test', REAL)
    assert task.circumstances()['isolation'] in tools.ISOLATION and load_task('GSM8K', 'test', REAL).circumstances() == {}
    class Forgetful(ast.NodeTransformer):
        "Every function returns None"
        def visit_Return(self, node): return ast.Return(ast.Constant(None))
    for i, conversation in enumerate(task):
        solution = conversation['messages'][-1]['content']
        assert task.evaluate(conversation, solution), conversation['entry_point']
        assert not task.evaluate(conversation, ast.unparse(ast.fix_missing_locations(Forgetful().visit(ast.parse(solution))))), conversation['entry_point']
        if i < 24: assert task.evaluate(conversation, f'Sure:\n```python\n{solution}\n```\nDone.')
    assert not task.evaluate(task[0], '') and not task.evaluate(task[0], 'import sys\nsys.exit(0)')
    assert not task.evaluate(task[0], 'import os\nos._exit(0)')


@real
def test_the_seeds_finetuning_mixture_has_651_steps_of_32():
    mixture = tasks.sft_mixture(REAL)
    assert mixture.counts == {'ARC-Easy': 2251, 'ARC-Challenge': 1119, 'GSM8K': 7473, 'SmolTalk': 9318}
    assert (len(mixture) - 9318 + 10_000) // 32 == 651


def test_the_order_is_pinned_for_all_time():
    assert permutation(8).tolist() == PINNED
    assert permutation(0).tolist() == [] and permutation(1).tolist() == [0]


@pytest.mark.parametrize('text,message', [
    ('not json', 'line 1: not JSON'), ('{"messages": []}', 'line 1: expected a list'), ('[]', 'line 1: expected a list'),
    ('[{"role": "user"}]', "needs 'role' and 'content'"), ('[{"role": "user", "content": "a"}]', 'must alternate'),
    ('[{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "image", "text": ""}]}]', 'content must be'),
    ('[{"role": "user", "content": null}, {"role": "assistant", "content": "b"}]', 'content must be'), ('', 'no conversation')])
def test_malformed_jsonl_is_named_by_file_and_line(tmp_path, text, message):
    (tmp_path/'own.jsonl').write_text(text)
    with pytest.raises(NanochatError, match='own.jsonl') as error: load_task('Custom:own.jsonl', 'train', tmp_path)
    assert message in str(error.value) and '\n' not in str(error.value)


def test_damaged_and_foreign_parquet_is_one_line(tmp_path):
    file = tmp_path/'openai/gsm8k/main/train-00000-of-00001.parquet'
    file.parent.mkdir(parents=True)
    pq.write_table(pa.table({'question': ['?'] * 999, 'answer': ['#### 1'] * 999}), file)
    whole = file.read_bytes()
    for content, message in [(whole[:-20], 'not a readable parquet'), (b'', 'not a readable parquet')]:
        file.write_bytes(content)
        with pytest.raises(NanochatError, match=message): load_task('GSM8K', 'train', tmp_path)
    pq.write_table(pa.table({'text': ['a']}), file)
    with pytest.raises(NanochatError, match='no column question, answer'): load_task('GSM8K', 'train', tmp_path)
    pq.write_table(pa.table({'question': ['?'], 'answer': [3]}), file)
    with pytest.raises(NanochatError, match='row 0 does not fit the published schema'): load_task('GSM8K', 'train', tmp_path)[0]


def test_unknown_names_and_missing_data_name_the_choices(tmp_path):
    with pytest.raises(NanochatError, match='ARC-Easy, ARC-Challenge'): load_task('Trivia', 'test', tmp_path)
    with pytest.raises(NanochatError, match="no split 'train'"): load_task('HumanEval', 'train', tmp_path)
    with pytest.raises(NanochatError, match='no test file'): load_task('HumanEval', 'test', tmp_path)
    assert tasks.graded_tasks(tmp_path) == []


def test_spelling_never_shares_a_word_between_train_and_test(tmp_path):
    (tmp_path/'words.txt').write_text('\n'.join(f'w{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}x' for i in range(676)))
    for name in ('SpellingBee', 'SimpleSpelling'):
        train, test = load_task(name, 'train', tmp_path, stop=3000), load_task(name, 'test', tmp_path)
        assert not set(train.words) & set(test.words) and len(train.words) + len(test.words) == 676
        assert len(train) == 3000 and len(test) == 256
        assert train[17] == load_task(name, 'train', tmp_path, stop=3000)[17]
    for conversation in load_task('SpellingBee', 'test', tmp_path):
        parts = conversation['messages'][-1]['content']
        call, output = (next(p['text'] for p in parts if p['type'] == t) for t in ('python', 'python_output'))
        word, letter = re.fullmatch(r"'(\w+)'\.count\('(\w)'\)", call).groups()
        assert word.count(letter) == int(output) == int(tasks.final_answer(tasks.message_text(parts)))


def test_mixtures_oversample_exactly_and_slice_like_lists():
    make = lambda n, tag: CustomJSON([[dict(role='user', content=tag), dict(role='assistant', content=str(i))] for i in range(n)], tag)
    mixture = Mixture([(make(30, 'a'), 1), (make(7, 'b'), 3)])
    seen = [(c['messages'][0]['content'], c['messages'][1]['content']) for c in mixture]
    assert len(seen) == 51 and all(seen.count(('b', str(i))) == 3 for i in range(7)) and all(seen.count(('a', str(i))) == 1 for i in range(30))
    assert [c for c in mixture[10:20]] == [mixture[i] for i in range(10, 20)]
    assert seen == [(c['messages'][0]['content'], c['messages'][1]['content']) for c in Mixture([(make(30, 'a'), 1), (make(7, 'b'), 3)])]
    assert seen != [(c['messages'][0]['content'], c['messages'][1]['content']) for c in Mixture([(make(30, 'a'), 1), (make(7, 'b'), 3)], seed=7)]


def test_the_kindergarten_has_every_task_in_the_published_schemas(tmp_path):
    make_world_root = pytest.importorskip('nanochat.kindergarten').make_world_root
    make_world_root(tmp_path, people=12, seed=3, documents=64)
    assert tasks.graded_tasks(tmp_path) == ['ARC-Easy', 'ARC-Challenge', 'MMLU', 'GSM8K', 'HumanEval', 'Facts']
    for name in tasks.graded_tasks(tmp_path):
        task = load_task(name, 'test', tmp_path, stop=40)
        for conversation in task[:4 if name == 'HumanEval' else 40]:
            assert tasks.conversation_problem(conversation['messages']) is None
            assert task.evaluate(conversation, tasks.message_text(conversation['messages'][-1]['content'])), conversation
            assert not task.evaluate(conversation, 'I do not know')
    mixture = tasks.midtraining_mixture(tmp_path, {'SmolTalk': 30, 'MMLU-aux': 40, 'GSM8K': 20, 'Facts': {'rows': 10, 'times': 2}})
    assert mixture.counts == {'SmolTalk': 30, 'MMLU-aux': 40, 'GSM8K': 20, 'Facts': 20}


def test_facts_look_for_the_word_asked_for_as_a_whole_word():
    ask = lambda text, **more: tasks.Facts([[dict(role='user', content='?'), dict(role='assistant', content=text, **more)]])
    for task, right, wrong in [(ask('Mara has a cat.'), ['cat', "Mara's pet is a CAT!", 'a\tcat'], ['category', '', 'a dog', 'c a t']),
                               (ask('Old Mill'), ['the old  mill.'], ['mill', 'Mill Old', 'oldmill']),
                               (ask('In the old mill.', answer='old mill'), ['old mill'], ['mill'])]:
        assert all(task.evaluate(task[0], text) for text in right) and not any(task.evaluate(task[0], text) for text in wrong)


def test_a_line_separator_within_a_message_does_not_end_the_line(tmp_path):
    text = 'one\u2028two\u0085three'
    (tmp_path / 'a.jsonl').write_text(json.dumps([dict(role='user', content=text), dict(role='assistant', content='yes')], ensure_ascii=False) + '\n')
    assert read_conversations(tmp_path / 'a.jsonl')[0][0]['content'] == text


def test_a_call_without_a_result_is_still_a_call():
    assert tool_parts('So <<1/0>> it is.')[1] == {'type': 'python', 'text': '1/0'} and len(tool_parts('So <<1/0>> it is.')) == 3
