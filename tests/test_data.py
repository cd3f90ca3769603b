"""Data: shards, splits, downloads, batches — what crosses files and processes."""
import errno
import json
import random
import os
import subprocess
import sys
import time
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
import numpy as np
import pytest
import torch

from nanochat.common import NanochatError, Run, list_profiles, load_profile
from nanochat.dataloader import ConversationLoader, DocumentLoader
from nanochat import dataset
from nanochat.dataset import (CORPORA, corpus_files, corpus_here, corpus_sources, describe_file, download, download_extra, find_bundle, find_corpus, folder_root, hub_names, main, make_kindergarten, parquet_documents, parquet_row_groups,
                              split_files, update_manifest, verify_files, with_retries)

FINEWEB = CORPORA['fineweb-edu']
SHARED = Path(__file__).resolve().parents[2]/'shared'/'data'


class ByteTokenizer:
    "A token a byte: enough of a tokenizer to test what is made of tokens."
    bos, special = 256, {'<|bos|>': 256, '<|assistant_end|>': 257}

    def encode_flat(self, texts, prepend=None):
        lists = [[prepend] + list(text.encode()) for text in texts.to_pylist()]
        return np.array(sum(lists, []), np.uint32), np.array(list(map(len, lists)), np.uint32)

    def render_conversation(self, conversation, max_tokens=2048):
        ids, mask = [256], [0]
        for message in conversation['messages']:
            part = [*message['content'].encode(), 257]
            ids, mask = ids + part, mask + [int(message['role'] == 'assistant')]*len(part)
        return ids[:max_tokens], mask[:max_tokens]


def text(i): return f'document {i}: ' + 'words of it, '*(i*7 % 40)

def write_shards(folder, count=4, documents=40, group=8):
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder/FINEWEB.shard(i) for i in range(count)]
    for i, path in enumerate(paths): pq.write_table(pa.table({'text': [text(i*documents + j) for j in range(documents)]}), path, row_group_size=group)
    return paths

def chat(question, answer): return {'messages': [dict(role='user', content=question), dict(role='assistant', content=answer)]}

CHATS = [chat('q'*(i % 23), 'a'*(i % 11)) for i in range(70)]


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv('NANOCHAT_HOME', str(tmp_path/'home'))
    write_shards(tmp_path/'root'/FINEWEB.repo)
    return tmp_path/'root'


def split(root): return split_files(root, FINEWEB, corpus_here(root, FINEWEB))

def equal(a, b): return torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)


# shards and splits

def test_ranks_share_all_row_groups_without_overlap(root):
    files = split(root)[0]
    whole = [(file, group) for file, group, *_ in parquet_row_groups(files)]
    parts = [[(file, group) for file, group, *_ in parquet_row_groups(files, rank=r, world_size=3)] for r in range(3)]
    assert sorted(sum(parts, [])) == whole and len(whole) == 3*5

def test_reading_resumes_at_any_row_group(root):
    files = split(root)[0]
    documents = list(parquet_documents(files))
    for file in range(3):
        for group in range(5): assert list(parquet_documents(files, start=(file, group))) == documents[file*40 + group*8:]

@pytest.mark.parametrize('damage, says', [(lambda b: b[:-40], 'truncated'), (lambda b: b'', 'truncated'), (lambda b: b'not parquet at all', 'not parquet')])
def test_a_broken_shard_is_named_with_the_fix(root, damage, says):
    path = split(root)[0][1]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(NanochatError, match=f'{path.name}.*{says}.*run the dataset stage again'): list(parquet_documents([path]))

def test_a_shard_without_text_is_named(root, tmp_path):
    path = tmp_path/'labels.parquet'
    pq.write_table(pa.table({'text': [1, 2]}), path)
    with pytest.raises(NanochatError, match='labels.parquet.*strings.*int64'): list(parquet_documents([path]))

def test_validation_shard_stays_when_shards_arrive(root):
    first = split(root)[1]
    write_shards(root/FINEWEB.repo, count=7)
    train, val = split(root)
    assert val == first and len(train) == 6 and val[0] not in train

def test_catalogue_validation_shard_is_chosen_at_first_use_and_never_later(root):
    pinned = root/FINEWEB.repo/FINEWEB.val_shard
    pinned.write_bytes((root/FINEWEB.repo/FINEWEB.shard(0)).read_bytes())
    (root/FINEWEB.repo/'shard_01900.parquet').write_bytes(pinned.read_bytes())
    assert split(root)[1] == [pinned]

def test_catalogue_validation_shard_that_comes_late_is_text_to_read(root):
    first = split(root)[1]
    (root/FINEWEB.repo/FINEWEB.val_shard).write_bytes((root/FINEWEB.repo/FINEWEB.shard(0)).read_bytes())
    assert split(root)[1] == first  # what was trained on must not become what is measured on

def test_a_missing_pinned_shard_is_an_error_not_another_choice(root):
    split(root)[1][0].unlink()
    with pytest.raises(NanochatError, match='shard_00003.parquet.*missing'): split(root)

def test_read_only_folder_keeps_its_pin_in_the_run(root, monkeypatch):
    def refuse(path, data): raise OSError(errno.EROFS, 'read-only')
    monkeypatch.setattr('nanochat.dataset.write_atomic', refuse)
    main(run='r', profile='tiny', data=str(root), shards=-1)
    write_shards(root/FINEWEB.repo, count=6)
    run = Run.open('r')
    run.path('stages', 'dataset.json').unlink()
    main(run='r', profile='tiny', data=str(root), shards=-1)
    assert Run.open('r').info['sources'][0]['val_shard'] == 'shard_00003.parquet' and len(corpus_files(Run.open('r'))) == 5

def test_stage_finds_a_flipped_bit(root):
    files = sorted((root/FINEWEB.repo).glob('*.parquet'))
    update_manifest(root, files={path.relative_to(root).as_posix(): describe_file(path) for path in files})
    data = bytearray(files[1].read_bytes()); data[500] ^= 4; files[1].write_bytes(data)
    assert verify_files(root, files, digests=False) == 4
    with pytest.raises(NanochatError, match='shard_00001.parquet.*SHA-256'): main(run='r', profile='tiny', data=str(root))

def test_cli_answers_bad_input_with_one_line_and_status_2(root, tmp_path):
    for options in (['--data', 'nowhere'], ['--data', str(root), '--corpus', 'wikipedia'], ['--data', str(tmp_path)]):
        done = subprocess.run([sys.executable, '-m', 'nanochat.dataset', '--run', 'cli', '--profile', 'tiny', *options], capture_output=True, text=True, env={**os.environ})
        assert done.returncode == 2 and done.stderr.startswith('nanochat: error:') and done.stderr.count('\n') == 1 and 'Traceback' not in done.stderr, done.stderr


# downloads

@pytest.fixture
def hub(monkeypatch):
    "A hub on this machine, with its files in `.files`, each request in `.log`, and in `.bad` the bad answers that it is to give first: part of a path, status."
    import hashlib, threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Hub(BaseHTTPRequestHandler):
        files, log, wrong, hang_up, bad = {}, [], set(), [], []
        def log_message(self, *args): pass
        def do_HEAD(self): self.answer(False)
        def do_GET(self): self.answer(True)
        def answer(self, body):
            path = self.path.split('?')[0]
            if body and Hub.bad and Hub.bad[0][0] in path: return self.send(Hub.bad.pop(0)[1], b'', {}, body)
            if '/tree/' in path:
                prefix = path.split('/api/datasets/')[1].split('/tree/')[0] + '/'
                return self.send(200, json.dumps([dict(type='file', path=name[len(prefix):], size=len(data), oid='0', lfs=dict(oid=hashlib.sha256(data).hexdigest(), size=len(data), pointerSize=1))
                                                  for name, data in self.files.items() if name.startswith(prefix)]).encode(), {'Content-Type': 'application/json'}, True)
            name = path[len('/datasets/'):].replace('/resolve/main', '')
            data, start = self.files[name], int((self.headers.get('Range') or 'bytes=0-')[6:].split('-')[0])
            headers = {'ETag': f'"{hashlib.sha256(data).hexdigest()}"', 'X-Repo-Commit': 'c'*40, 'Content-Range': f'bytes {start}-{len(data) - 1}/{len(data)}'}
            if name in self.wrong: data = data[::-1]
            if body: Hub.log.append((name.split('/')[-1], start))
            self.send(206 if start else 200, data[start:], headers, body, True)
        def send(self, status, data, headers, body, file=False):
            self.send_response(status)
            for key, value in {**headers, 'Content-Length': str(len(data))}.items(): self.send_header(key, value)
            self.end_headers()
            sent = data[:Hub.hang_up.pop(0)] if body and file and Hub.hang_up else data
            if body: self.wfile.write(sent)
            if len(sent) < len(data): self.connection.close()

    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('HF_ENDPOINT', f'http://127.0.0.1:{server.server_port}')
    monkeypatch.setattr(dataset, 'PAUSES', [.01]*3)
    monkeypatch.setattr('huggingface_hub.utils._http.time', type('Clock', (), dict(time=time.time, sleep=lambda seconds: None)))
    yield Hub
    server.shutdown()

def serve(hub, root): hub.files.update({f'{FINEWEB.repo}/{path.name}': path.read_bytes() for path in (root/FINEWEB.repo).glob('*.parquet')})

NAMES = [FINEWEB.shard(i) for i in range(4)]

def test_download_mirrors_whole_files_once(root, hub, tmp_path):
    serve(hub, root)
    got = download(tmp_path/'mirror', FINEWEB.repo, NAMES)
    assert list(parquet_documents(got)) == list(parquet_documents(sorted((root/FINEWEB.repo).glob('*.parquet'))))
    assert len(hub.log) == 4 and download(tmp_path/'mirror', FINEWEB.repo, NAMES) == got and len(hub.log) == 4

def test_one_bad_file_is_reported_and_the_others_kept(root, hub, tmp_path):
    serve(hub, root)
    hub.wrong.add(f'{FINEWEB.repo}/{NAMES[2]}')
    with pytest.raises(NanochatError, match='1 of 4 files.*shard_00002.parquet.*3 are whole') as error: download(tmp_path/'mirror', FINEWEB.repo, NAMES)
    assert '\n' not in str(error.value) and not (tmp_path/'mirror'/FINEWEB.repo/NAMES[2]).exists()
    hub.wrong.clear(); hub.log.clear()
    download(tmp_path/'mirror', FINEWEB.repo, NAMES)
    assert {name for name, _ in hub.log} == {NAMES[2]}

def test_a_damaged_local_file_is_fetched_again(root, hub, tmp_path):
    serve(hub, root)
    got = download(tmp_path/'mirror', FINEWEB.repo, NAMES)
    got[1].write_bytes(got[1].read_bytes()[:-10])
    assert list(parquet_documents(download(tmp_path/'mirror', FINEWEB.repo, NAMES)))

def test_a_lost_connection_goes_on_where_it_stopped(root, hub, tmp_path, monkeypatch):
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, 'DOWNLOAD_CHUNK_SIZE', 1024)
    hub.files[f'{FINEWEB.repo}/{NAMES[0]}'] = data = os.urandom(50_000)
    hub.hang_up.append(20_000)
    assert download(tmp_path/'mirror', FINEWEB.repo, NAMES[:1])[0].read_bytes() == data
    assert [start > 0 for _, start in hub.log] == [False, True]

@pytest.mark.parametrize('status', [429, 503])
@pytest.mark.parametrize('where', ['/tree/', '/resolve/'])
def test_a_server_with_a_bad_minute_is_asked_again(root, hub, tmp_path, where, status):
    serve(hub, root)
    hub.bad += [(where, status)]*2
    assert len(download(tmp_path/'mirror', FINEWEB.repo, NAMES)) == 4 and not hub.bad

def test_a_file_that_arrives_wrong_once_is_fetched_once_more(root, hub, tmp_path, monkeypatch):
    serve(hub, root)
    asked, whole = [], dataset.sha256_file
    def first_wrong(path): asked.append(path); return 'wrong' if len(asked) == 1 else whole(path)
    monkeypatch.setattr(dataset, 'sha256_file', first_wrong)
    assert download(tmp_path/'mirror', FINEWEB.repo, NAMES[:1])[0].exists() and [name for name, _ in hub.log] == NAMES[:1]*2

@pytest.mark.parametrize('status, calls', [(429, 4), (500, 4), (404, 1), (None, 1)])
def test_only_what_can_get_better_is_tried_again(monkeypatch, status, calls):
    monkeypatch.setattr(dataset, 'PAUSES', [0]*3)
    seen, error = [], NanochatError('no')
    if status: error.response = type('Response', (), dict(status_code=status))
    def call(): seen.append(1); raise error
    with pytest.raises(NanochatError): with_retries(call)
    assert len(seen) == calls

def test_without_a_network_a_whole_mirror_is_used_and_a_part_of_one_is_not(root, hub, tmp_path, monkeypatch):
    serve(hub, root)
    hub.files['someone/else/a.parquet'] = hub.files['someone/else/b.parquet'] = b'x'
    download(tmp_path/'part', FINEWEB.repo, NAMES[:2])
    whole = download(tmp_path/'whole', FINEWEB.repo)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    assert download(tmp_path/'whole', FINEWEB.repo) == whole and len(whole) == 4
    assert len(download(tmp_path/'part', FINEWEB.repo, NAMES[:2])) == 2
    with pytest.raises(NanochatError, match='cannot list'): download(tmp_path/'part', FINEWEB.repo)

def test_a_short_download_of_an_extra_file_is_not_taken(tmp_path, monkeypatch):
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    class Short(BaseHTTPRequestHandler):
        def log_message(self, *args): pass
        def do_GET(self):
            self.send_response(200); self.send_header('Content-Length', '100'); self.end_headers()
            self.wfile.write(b'x'*(60 if 'short' in self.path else 100))
    server = ThreadingHTTPServer(('127.0.0.1', 0), Short)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(dataset, 'EXTRA_FILES', {name: f'http://127.0.0.1:{server.server_port}/{name}' for name in ('whole.txt', 'short.txt')})
    failed = download_extra(tmp_path)
    server.shutdown()
    assert len(failed) == 1 and 'short.txt' in failed[0] and (tmp_path/'whole.txt').exists() and not (tmp_path/'short.txt').exists()

def test_no_hub_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr('huggingface_hub.utils._http.time', type('Clock', (), dict(time=time.time, sleep=lambda seconds: None)))
    with pytest.raises(NanochatError, match='cannot list.*HF_ENDPOINT'): download(tmp_path, FINEWEB.repo, NAMES)


# text of one's own, mixtures

def open_stage(name, **options): return main(run=name, profile='tiny', **options)['results'], Run.open(name)

@pytest.mark.parametrize('kind', ['txt', 'jsonl', 'jsonl.gz', 'jsonl.zst', 'parquet'])
def test_text_of_ones_own_is_all_there_and_held_out_by_its_digest(root, tmp_path, kind):
    mine, texts = tmp_path/'mine', [text(i) for i in range(200)]
    mine.mkdir()
    if kind == 'parquet': pq.write_table(pa.table({'content': texts}), mine/'a.parquet')
    elif kind == 'txt':
        for i, one in enumerate(texts): (mine/f'{i}.txt').write_text(one)
    else:
        with pa.output_stream(str(mine/f'a.{kind}'), compression='detect') as out: out.write('\n'.join(json.dumps(dict(content=one)) for one in texts).encode())
    results, run = open_stage('own', data=str(root), corpus=str(mine))
    train, val = (set(parquet_documents(corpus_files(run, split))) for split in ('train', 'val'))
    assert train | val == set(texts) and not train & val and 2 <= len(val) <= 25
    if kind != 'txt': return
    for i in range(50): (mine/f'new{i}.txt').write_text(text(1000 + i))  # text that arrives later moves nothing
    _, later = open_stage('later', data=str(root), corpus=str(mine))
    assert val <= set(parquet_documents(corpus_files(later, 'val'))) and not val & set(parquet_documents(corpus_files(later)))

@pytest.mark.parametrize('name, content, says', [
    ('a.jsonl', b'{"text": "x"}\nnot json\n', 'a.jsonl, line 2, is not JSON'), ('a.jsonl', b'{"n": 1}\n', "line 1, has no text column 'text' but no strings"),
    ('a.jsonl', b'{"a": "x", "b": "y"}\n', "no text column 'text' but a, b; name it with --column"), ('a.txt', b'caf\xe9\n', 'a.txt is not UTF-8'),
    ('a.json', b'[{"text": "x"},', 'a.json is not JSON; mend the file'), ('a.json', b'{\n "text": "x"\n}', 'a.json, line 1, is not JSON'), ('a.json', b'[{"text": "x"}, 3]', 'a.json, row 2, holds no text'),
    ('a.jsonl.gz', b'no gzip', 'a.jsonl.gz cannot be read'), ('a.txt', b'one document', 'too few'), ('a.png', b'x', 'holds no text; files must end in .parquet'), ('a.parquet', b'PAR1', 'truncated or not parquet')])
def test_bad_text_of_ones_own_is_one_line(root, tmp_path, name, content, says):
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/name).write_bytes(content)
    with pytest.raises(NanochatError, match=says): open_stage('bad', data=str(root), corpus=str(tmp_path/'mine'))

def jsonl(path, texts, key='text'): path.write_text('\n'.join(json.dumps({key: one}) for one in texts))

def test_a_file_named_val_is_the_validation_part_and_nothing_of_it_is_trained_on(root, tmp_path):
    (tmp_path/'mine').mkdir()
    jsonl(tmp_path/'mine'/'train.jsonl', [text(i) for i in range(300)])
    jsonl(tmp_path/'mine'/'val.jsonl', [text(1000 + i) for i in range(30)])
    jsonl(tmp_path/'mine'/'test.jsonl', ['a test'])
    _, run = open_stage('own', data=str(root), corpus=str(tmp_path/'mine'))
    assert set(parquet_documents(corpus_files(run, 'val'))) == {text(1000 + i) for i in range(30)}
    assert set(parquet_documents(corpus_files(run))) == {text(i) for i in range(300)}

@pytest.mark.parametrize('names', ['000', 'abc'])
def test_json_lines_of_a_repository_keep_their_validation_file(root, names):
    folder = root/'someone/lines/da'
    for split, start, name in zip(('train', 'val', 'test'), (0, 500, 900), names):
        (folder/split).mkdir(parents=True)
        jsonl(folder/split/f'{name}.jsonl', [text(start + i) for i in range(20)])
    _, run = open_stage('lines', data=str(root), corpus='someone/lines/da')
    assert set(parquet_documents(corpus_files(run))) == {text(i) for i in range(20)} and set(parquet_documents(corpus_files(run, 'val'))) == {text(500 + i) for i in range(20)}

def test_splits_are_known_by_their_folders_and_titles_are_no_splits():
    def chosen(*names): return [str(path) for path in dataset.choose_files(list(map(PurePosixPath, names)))]
    assert chosen('da/test/0.parquet', 'da/train/0.parquet', 'da/train/1.parquet') == ['da/train/0.parquet', 'da/train/1.parquet']
    assert chosen('alice.txt', 'emma.txt', 'trains_of_india.txt', 'valley.txt', '.git/x.txt') == ['alice.txt', 'emma.txt', 'trains_of_india.txt', 'valley.txt']

def test_what_is_held_out_when_a_folder_has_grown_was_held_out_before(tmp_path):
    texts, held = [text(i) for i in range(3000)], []
    for one_in in (20, 21, 60):
        (tmp_path/str(one_in)).mkdir()
        dataset.write_shards(tmp_path/str(one_in), iter(texts), one_in)
        held.append(set(parquet_documents([tmp_path/str(one_in)/'val.parquet'])))
    assert held[0] >= held[1] >= held[2] and len(held[0]) > len(held[2]) > 10

def test_one_document_is_held_out_even_when_each_fills_a_shard(tmp_path):
    texts = [text(i) for i in range(5)]
    dataset.write_shards(tmp_path, iter(texts), 2**40, size=1)
    [held] = parquet_documents([tmp_path/'val.parquet'])
    assert sorted([held, *parquet_documents(sorted(tmp_path.glob('train-*.parquet')))]) == sorted(texts)

def test_two_languages_of_one_repository_have_a_validation_shard_each(root):
    for language, names in (('en', 'ab'), ('de', 'cd')):
        for name in names: write_shards(root/'someone/tales'/language, count=1)[0].rename(root/'someone/tales'/language/f'{name}.parquet')
    _, run = open_stage('two', data=str(root), corpus='someone/tales/en=1,someone/tales/de=2')
    assert [source['val_shard'] for source in run.info['sources']] == ['b.parquet', 'd.parquet']

def test_a_wanted_column_is_for_ones_own_text_and_nulls_are_empty_documents(root, tmp_path):
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'a.jsonl').write_text('\n'.join(json.dumps(dict(story=None if i == 5 else text(i), url='http://a', note='n')) for i in range(40)))
    _, run = open_stage('column', data=str(root), corpus=f'fineweb-edu=3,{tmp_path/"mine"}=1', column='story')
    own = corpus_sources(run)[1].files + corpus_sources(run, 'val')[1].files
    assert set(parquet_documents(own)) == {text(i) for i in range(40) if i != 5}

def test_a_run_of_an_earlier_version_is_told_so(root):
    _, run = open_stage('old', data=str(root))
    run.write_json({key: value for key, value in run.info.items() if key != 'sources'} | dict(train_files=['x']), 'run.json')
    with pytest.raises(NanochatError, match='earlier version.*start a new run'): corpus_files(run)

def test_a_repository_of_the_hub_keeps_its_files_and_needs_no_network_again(root, hub, tmp_path, monkeypatch):
    shard = (root/FINEWEB.repo/NAMES[0]).read_bytes()
    hub.files |= {f'someone/tales/en/{name}': shard for name in ('train-0.parquet', 'train-1.parquet', 'train-2.parquet', 'validation-0.parquet', 'test-0.parquet')}
    corpus = find_corpus('someone/tales/en')
    names = hub_names(tmp_path/'mirror', corpus, 2)
    assert names == ['en/train-0.parquet', 'en/train-1.parquet', 'en/validation-0.parquet']
    download(tmp_path/'mirror', corpus.repo, names, corpus.pattern)
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    assert hub_names(tmp_path/'mirror', corpus, 2) == names and len(download(tmp_path/'mirror', corpus.repo, names, corpus.pattern)) == 3

def test_a_mixture_gives_each_corpus_its_share_of_the_tokens_and_resumes(root, tmp_path):
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'a.jsonl').write_text('\n'.join(json.dumps(f'{i} ' + 'zzz '*70) for i in range(200)))
    _, run = open_stage('mixed', data=str(root), corpus=f'fineweb-edu=3,{tmp_path/"mine"}=1')
    sources = corpus_sources(run)
    for packing in ('flat', 'best_fit'):
        options = dict(packing=packing, buffer=12, encode_batch=4)
        loader, states, record = make(sources, **options), [], []
        for _ in range(1500): states.append(json.dumps(loader.state_dict())); record.append(next(loader))
        own = torch.cat([batch.inputs for batch in record]).eq(ord('z')).float().mean()
        assert packing == 'best_fit' or .24 < own*286/210 < .27, own  # 210 of about 286 tokens of such a document are a z; best_fit crops after the mixing
        for stop in range(0, 1500, 111):
            again = make(sources, **options)
            again.load_state_dict(json.loads(states[stop]))
            assert all(equal(next(again), batch) for batch in record[stop:stop + 10])
    with pytest.raises(NanochatError, match='mixture of 2, not 1'): make(sources[:1], **options).load_state_dict(json.loads(states[0]))

def make_world(folder, answers):
    os.environ['NANOCHAT_HOME'] = str(folder)
    answers.put(str(make_kindergarten(people=20, seed=1, documents=200)))

def test_two_processes_that_make_the_same_world_make_it_once(tmp_path):
    import multiprocessing
    context = multiprocessing.get_context('spawn')
    answers = context.Queue()
    both = [context.Process(target=make_world, args=(tmp_path, answers)) for _ in range(2)]
    for process in both: process.start()
    roots = [Path(answers.get(timeout=120)) for _ in both]
    for process in both: process.join()
    assert roots[0] == roots[1] and [process.exitcode for process in both] == [0, 0]
    assert verify_files(roots[0], sorted(roots[0].rglob('*.parquet'))) > 5 and not list(roots[0].parent.glob('*.part'))


# documents

@pytest.fixture
def files(tmp_path): return write_shards(tmp_path/'shards')

def make(files, **options): return DocumentLoader(files, ByteTokenizer(), 4, 32, **options)

def test_batches_are_the_stream_cut_into_rows(files):
    stream = [i for document in parquet_documents(files) for i in [256, *document.encode()]]
    loader = make(files, encode_batch=3)
    rows = torch.cat([next(loader).inputs for _ in range(50)])
    assert rows.flatten().tolist() == stream[:rows.numel()]

def test_targets_are_inputs_one_step_later(files):
    batches = [next(loader) for loader in [make(files)] for _ in range(20)]
    inputs, targets = (torch.cat([getattr(batch, name).flatten() for batch in batches]) for name in ('inputs', 'targets'))
    assert torch.equal(inputs[1:], targets[:-1])

@pytest.mark.parametrize('world_size, batch_size', [(2, 4), (4, 2), (2, 2), (1, 8)])
def test_union_of_ranks_is_the_single_process(files, world_size, batch_size):
    loader = make(files)
    single = torch.cat([next(loader).inputs for _ in range(16)])
    ranks = [DocumentLoader(files, ByteTokenizer(), batch_size, 32, rank=r, world_size=world_size) for r in range(world_size)]
    steps = [torch.stack([next(rank).inputs for rank in ranks], 1).flatten(0, 1) for _ in range(64//(world_size*batch_size))]
    assert torch.equal(torch.cat(steps), single)
    assert all(rank.state_dict() == loader.state_dict() for rank in ranks)

@pytest.mark.parametrize('split', ['rows', 'row_groups'])
def test_documents_resume_to_the_bit_from_every_batch(files, split):
    options = dict(split=split, rank=1, world_size=2, encode_batch=3)
    loader, states, record = make(files, **options), [], []
    for _ in range(400): states.append(json.dumps(loader.state_dict())); record.append(next(loader))
    assert loader.epoch >= 1
    for start in range(0, 390, 13):
        again = make(files, **options)
        again.load_state_dict(json.loads(states[start]))
        assert all(equal(next(again), batch) for batch in record[start:start + 10])

@pytest.mark.parametrize('split', ['rows', 'row_groups'])
def test_best_fit_resumes_to_the_bit_from_every_batch(files, split):
    options = dict(split=split, rank=1, world_size=2, encode_batch=3, packing='best_fit', buffer=12)
    loader, states, record = make(files, **options), [], []
    for _ in range(120): states.append(json.dumps(loader.state_dict())); record.append(next(loader))
    for start in range(0, 120, 7):
        again = make(files, **options)
        again.load_state_dict(json.loads(states[start]))
        assert all(equal(next(again), batch) for batch in record[start:start + 10])

def test_best_fit_rows_begin_with_a_document_and_hold_only_documents(files):
    loader = make(files, packing='best_fit', buffer=12)
    documents = [bytes(document, 'utf-8') for document in parquet_documents(files)]
    for batch in (next(loader) for _ in range(20)):
        rows = torch.cat([batch.inputs, batch.targets[:, -1:]], 1)
        for row in rows.tolist():
            parts = bytes(i if i < 256 else 0 for i in row).split(b'\0')
            assert row[0] == 256 and parts[0] == b''
            assert all(part in documents for part in parts[1:-1]) and any(document.startswith(parts[-1]) for document in documents)

def test_best_fit_ranks_are_the_single_process(files):
    loader = make(files, packing='best_fit', buffer=12)
    single = torch.cat([next(loader).inputs for _ in range(8)])
    ranks = [make(files, rank=r, world_size=2, packing='best_fit', buffer=12) for r in range(2)]
    assert torch.equal(torch.cat([torch.stack([next(rank).inputs for rank in ranks], 1).flatten(0, 1) for _ in range(4)]), single)

def test_a_state_of_another_packing_is_refused(files):
    with pytest.raises(NanochatError, match="packing='flat'"): make(files, packing='best_fit').load_state_dict(make(files).state_dict())

@pytest.mark.parametrize('packing', ['flat', 'best_fit'])
def test_a_thousand_random_stops_lose_no_token(files, packing):
    options, draw = dict(packing=packing, buffer=12), random.Random(7)
    loader, states, record = make(files, **options), [], []
    for _ in range(1000): states.append(json.dumps(loader.state_dict())); record.append(next(loader))
    again = make(files, **options)
    for stop in draw.sample(range(1000), 1000):
        again.load_state_dict(json.loads(states[stop]))
        assert equal(next(again), record[stop])

def test_state_stays_small(files):
    loader = make(files)
    for _ in range(100): next(loader)
    assert len(json.dumps(loader.state_dict())) < 400

def test_state_with_another_shard_list_is_refused(files):
    state = make(files).state_dict()
    with pytest.raises(NanochatError, match='shard_00000.parquet'): make(files[1:]).load_state_dict(state)

def test_empty_and_null_documents_leave_no_trace(tmp_path):
    for name, texts in (('with', ['', 'abc', None, 'de', '']), ('without', ['abc', 'de'])): pq.write_table(pa.table({'text': texts}), tmp_path/f'{name}.parquet')
    a, b = (DocumentLoader([tmp_path/f'{name}.parquet'], ByteTokenizer(), 1, 8) for name in ('with', 'without'))
    assert all(equal(next(a), next(b)) for _ in range(5))

def test_shards_without_text_are_an_error_not_a_hang(tmp_path):
    pq.write_table(pa.table({'text': ['', '']}), tmp_path/'x.parquet')
    with pytest.raises(NanochatError, match='hold no text'): DocumentLoader([tmp_path/'x.parquet'], ByteTokenizer(), 1, 8).next_batch()


# conversations

PACKINGS = ['flat', 'padded', 'best_fit']

def talk(chats=CHATS, batch_size=4, sequence_len=40, **options): return ConversationLoader(chats, ByteTokenizer(), batch_size, sequence_len, **options)

@pytest.mark.parametrize('mask', [True, False])
@pytest.mark.parametrize('packing', PACKINGS)
def test_conversations_resume_to_the_bit_from_every_batch(packing, mask):
    options = dict(packing=packing, mask=mask, epochs=2)
    loader, states, record = talk(**options), [], []
    for batch in loader: record.append(batch); states.append(json.dumps(loader.state_dict()))
    for start in range(0, len(record), 3):
        again = talk(**options)
        again.load_state_dict(json.loads(states[start]))
        rest = list(again)
        assert len(rest) == len(record) - start - 1 and all(map(equal, rest, record[start + 1:])) and again.stats == loader.stats

@pytest.mark.parametrize('packing', PACKINGS)
def test_conversation_ranks_are_the_single_process(packing):
    single = torch.cat([batch.targets for batch in talk(packing=packing, epochs=1)])
    ranks = [list(talk(packing=packing, epochs=1, rank=r, world_size=2)) for r in range(2)]
    both = torch.stack([torch.cat([batch.targets for batch in rank]) for rank in ranks], 1).flatten(0, 1)
    assert len(ranks[0]) == len(ranks[1]) and torch.equal(both[:len(single)], single) and (both[len(single):] == -1).all()

@pytest.mark.parametrize('packing', PACKINGS)
def test_each_answer_token_is_a_target_once_an_epoch(packing):
    loader = talk(packing=packing, epochs=1)
    targets = torch.cat([batch.targets.flatten() for batch in loader])
    assert (targets >= 0).sum() == sum(sum(ByteTokenizer().render_conversation(c)[1]) for c in CHATS) == loader.stats['supervised']
    assert set(targets.unique().tolist()) == {-1, ord('a'), 257}

@pytest.mark.parametrize('packing', PACKINGS)
def test_no_row_without_a_target_reaches_a_model(packing):
    chats = CHATS + [chat('long question '*20, 'never reached')]*9
    loader = talk(chats, packing=packing, epochs=1)
    batches = list(loader)
    assert all((batch.targets >= 0).any(1).all() for batch in batches[:-1]) and (batches[-1].targets >= 0).any()
    assert (loader.stats['dropped'] if packing != 'flat' else loader.stats['skipped_rows']) >= 9

def test_nothing_to_learn_is_an_error_not_a_hang():
    with pytest.raises(NanochatError, match='none of the 3'): talk([chat('x'*100, 'y')]*3, packing='padded').next_batch()
    with pytest.raises(NanochatError, match='empty'): talk([])

def test_best_fit_keeps_conversations_whole():
    loader = talk(packing='best_fit', epochs=1)
    rows = []
    while row := loader.next_row(): rows.append(row[0])
    assert sum(ids.count(256) for ids in rows) == len(CHATS) and all(ids[0] == 256 and ids[-1] == 257 for ids in rows)
    assert len(rows) < talk(packing='padded').count()['rows']/1.3

def test_another_mixture_or_seed_is_refused_at_resume():
    state = talk().state_dict()
    for other in (dict(seed=7), dict(packing='padded'), dict(chats=CHATS[1:])):
        with pytest.raises(NanochatError, match='differs'): talk(**other).load_state_dict(state)


# real data

@pytest.mark.skipif(not SHARED.exists(), reason='no real data here')
def test_real_shards_are_found_read_and_packed(tmp_path, monkeypatch):
    monkeypatch.setenv('NANOCHAT_HOME', str(tmp_path))
    record = main(run='real', profile='tiny', data=str(SHARED), shards=-1)
    assert record['results']['files'] == 7 and record['results']['documents'] + record['results']['val']['documents'] == 13_645
    run = Run.open('real')
    assert run.info['sources'][0]['val_shard'] == 'shard_00007.parquet' and run.info['bundle'] and find_bundle(folder_root(SHARED))
    loader = DocumentLoader(corpus_files(run), ByteTokenizer(), 8, 256)
    for _ in range(20): batch = next(loader)
    again = DocumentLoader(corpus_files(run), ByteTokenizer(), 8, 256)
    again.load_state_dict(loader.state_dict())
    assert equal(next(loader), next(again)) and batch.inputs.shape == (8, 256)


def test_a_json_array_is_text_as_json_lines_are_and_a_pattern_names_files(tmp_path, monkeypatch):
    rows = [dict(text=text(i), url='http://a') for i in range(60)]
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'array.json').write_text(json.dumps(rows, indent=1))
    jsonl(tmp_path/'mine'/'lines.jsonl', [row['text'] for row in rows])
    (tmp_path/'mine'/'config.json').write_text('{"epochs": 3}')
    read = lambda name: [document for path in corpus_here(tmp_path, find_corpus(str(tmp_path/'mine'/name))) for document in dataset.file_documents(path)]
    assert read('array.json') == read('array*') == read('*.jsonl') == read('') == [row['text'] for row in rows]   # beside other files, a .json is a setting
    monkeypatch.chdir(tmp_path)
    assert find_corpus('mine/*.jsonl') == find_corpus(f'{tmp_path}/mine/*.jsonl') and find_corpus('yours/mine/*.jsonl').repo == 'yours/mine'


@pytest.mark.parametrize('world_size', [2, 3, 5, 8])
@pytest.mark.parametrize('packing', ['flat', 'best_fit'])
def test_a_run_goes_from_one_process_to_several_and_back_to_the_token(files, packing, world_size):
    options = dict(packing=packing, buffer=12, encode_batch=4)
    alone, states, record = DocumentLoader(files, ByteTokenizer(), 4, 32, **options), [], []
    for _ in range(120): states.append(json.dumps(alone.state_dict())); record.append(next(alone).inputs)
    rows = torch.cat(record)
    for stop in range(0, 40, 7):
        ranks = [DocumentLoader(files, ByteTokenizer(), 4, 32, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
        for rank in ranks: rank.load_state_dict(json.loads(states[stop]))
        dealt = torch.cat([torch.stack([next(rank).inputs for rank in ranks], 1).flatten(0, 1) for _ in range(3)])
        assert torch.equal(dealt, rows[4*stop:4*stop + len(dealt)])
        assert all(rank.state_dict() == ranks[0].state_dict() for rank in ranks)
        back, place = DocumentLoader(files, ByteTokenizer(), 4, 32, **options), 4*stop + len(dealt)
        back.load_state_dict(json.loads(json.dumps(ranks[-1].state_dict())))
        assert torch.equal(next(back).inputs, rows[place:place + 4])

def test_a_run_of_any_profile_may_go_on_with_another_number_of_processes():
    for name in list_profiles(): assert load_profile(name)['stages']['base'].get('split', 'rows') == 'rows', name


@pytest.fixture(scope='module')
def one_large_group(tmp_path_factory):
    "200 MB in a single row group of 10,000 documents."
    path = tmp_path_factory.mktemp('large')/'a.parquet'
    pq.write_table(pa.table({'text': [f'{i} ' + random.Random(i).randbytes(10_000).hex() for i in range(10_000)]}), path, row_group_size=10**6)
    return path

def test_a_large_row_group_is_never_in_memory_whole(one_large_group):
    code = '''import sys; from pathlib import Path; from nanochat.dataset import parquet_row_groups
def peak(): return int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])
before = peak()
assert sum(len(texts) for *_, texts in parquet_row_groups([Path(sys.argv[1])])) == 10_000
print(peak() - before)'''
    grown = int(subprocess.run([sys.executable, '-c', code, one_large_group], capture_output=True, text=True, check=True).stdout)
    assert pq.read_metadata(one_large_group).num_row_groups == 1 and grown < 120_000, f'{grown} kB'

def test_a_large_row_group_is_read_on_from_any_document(one_large_group):
    documents = list(parquet_documents([one_large_group]))
    assert [document.split()[0] for document in documents] == list(map(str, range(10_000)))
    for start in (0, 1, 1023, 1024, 1025, 5000, 9999):
        rest = [text for *_, first, texts in parquet_row_groups([one_large_group], start=(0, 0, start)) for text in texts.to_pylist()]
        assert rest == documents[start:]

@pytest.mark.parametrize('packing', ['flat', 'best_fit'])
def test_a_row_group_in_pieces_resumes_to_the_bit(tmp_path, packing):
    paths = [tmp_path/f'{i}.parquet' for i in range(2)]
    for i, path in enumerate(paths): pq.write_table(pa.table({'text': [text(3000*i + j) for j in range(3000)]}), path)
    def packed(): return DocumentLoader(paths, ByteTokenizer(), 4, 128, packing=packing, buffer=12)
    loader, states, record = packed(), [], []
    for _ in range(2000): states.append(json.dumps(loader.state_dict())); record.append(next(loader))
    assert {json.loads(state)['sources'][0]['document']//1024 for state in states} == {0, 1, 2}
    for stop in [*range(0, 1990, 97), *random.Random(3).sample(range(1990), 20)]:
        again = packed()
        again.load_state_dict(json.loads(states[stop]))
        assert all(equal(next(again), batch) for batch in record[stop:stop + 10])


# Ctrl-C in the tokenizer's trainer, in a process of its own: an interrupt that comes late must not end the tests

INTERRUPTED = '''
import itertools, os, random, signal, sys, threading, time
import rustbpe
draw, sent = random.Random(5), []
def words(count): return ' '.join(''.join(draw.choices('abcdefghijklmnopqrstuvwxyz', k=8)) for _ in range(count))
def stop(): sent.append(time.monotonic()); os.kill(os.getpid(), signal.SIGINT)
def progress(size, merges):  # called by the trainer between its batches, and after every 256 merges
    if not sent and bool(merges) == (sys.argv[1] == 'merging'): sent.append(0); threading.Timer(.1, stop).start()
small = [words(3000)]
expected = rustbpe.train(small, 400)
texts = itertools.repeat(words(20_000)) if sys.argv[1] == 'counting' else [words(1_000_000)]  # the first never ends; neither runs Python code
try: rustbpe.train(texts, 10**9, progress=progress)
except KeyboardInterrupt: print(time.monotonic() - sent[-1])
assert rustbpe.train(small, 400) == expected
'''

@pytest.mark.parametrize('during', ['counting', 'merging'])
def test_ctrl_c_ends_the_rust_trainer_soon_and_harms_nothing(during):
    pytest.importorskip('rustbpe')
    done = subprocess.run([sys.executable, '-c', INTERRUPTED, during], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and float(done.stdout) < 3, done.stdout + done.stderr   # a fraction of a second; without an ear for signals seven, or never
