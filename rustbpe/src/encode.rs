//! Text to ids, with the ranks of a finished vocabulary.
//!
//! A chunk's ids never depend on its neighbours, and a language repeats its chunks. So the work of merging is
//! done once for each distinct chunk and remembered: nearly every chunk is one look into a table, in which the
//! chunk and its ids share one cache line. What remains is cutting, looking up, and copying a few numbers.

use crate::key::{chunk_key, hash, FastMap, Waiting};
use crate::split::Splitter;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Mutex;

const NONE: u32 = u32::MAX;
const SHORT_MERGE: usize = 64; // up to so many bytes looking at all pairs again is faster than a heap
const MAX_SLOTS: usize = 1 << 19; // 16 MB; a fuller memory forgets everything
const MAX_LONG: usize = 1 << 16; // chunks of 16 bytes and more, as many are remembered ...
const LONG_CHUNK: usize = 256; // ... if they are no longer than this

/// The tokens and what two neighbours make.
pub struct Vocabulary {
    ids: FastMap<Box<[u8]>, u32>,
    bytes: [u32; 256],
    pairs: Pairs,
}

impl Vocabulary {
    /// `tokens` in the order of their ids, which is the order of their ranks. Every single byte must be among them.
    pub fn new(tokens: &[Vec<u8>]) -> Result<Vocabulary, String> {
        let ids: FastMap<Box<[u8]>, u32> = tokens.iter().enumerate().map(|(id, token)| (token.as_slice().into(), id as u32)).collect();
        if ids.len() != tokens.len() {
            return Err("two tokens have the same bytes".into());
        }
        let mut bytes = [NONE; 256];
        for (byte, id) in bytes.iter_mut().enumerate() {
            *id = *ids.get([byte as u8].as_slice()).ok_or_else(|| format!("the vocabulary has no token for byte {byte}"))?;
        }
        let mut pairs = Pairs::default();
        for (id, token) in tokens.iter().enumerate() {
            for middle in 1..token.len() {
                if let (Some(&left), Some(&right)) = (ids.get(&token[..middle]), ids.get(&token[middle..])) {
                    pairs.insert(left, right, id as u32);
                }
            }
        }
        Ok(Vocabulary { ids, bytes, pairs })
    }

    /// The ids of one chunk: those two neighbours become one that make the token with the lowest id, the left ones
    /// first, until no two make a token.
    pub fn encode_chunk(&self, chunk: &[u8], out: &mut Vec<u32>) {
        match self.ids.get(chunk) {
            Some(&id) => out.push(id),
            None if chunk.len() <= SHORT_MERGE => self.merge_short(chunk, out),
            None => self.merge_long(chunk, out),
        }
    }

    fn merge_short(&self, chunk: &[u8], out: &mut Vec<u32>) {
        let (mut ids, mut made) = ([NONE; SHORT_MERGE], [NONE; SHORT_MERGE]);
        let mut length = chunk.len();
        for (id, &byte) in ids.iter_mut().zip(chunk) {
            *id = self.bytes[byte as usize];
        }
        for i in 1..length {
            made[i - 1] = self.pairs.get(ids[i - 1], ids[i]);
        }
        while length > 1 {
            let (mut best, mut at) = (NONE, 0);
            for (i, &id) in made[..length - 1].iter().enumerate() {
                if id < best {
                    (best, at) = (id, i);
                }
            }
            if best == NONE {
                break;
            }
            ids[at] = best;
            ids.copy_within(at + 2..length, at + 1);
            made.copy_within(at + 1..length - 1, at);
            length -= 1;
            made[length - 1] = NONE;
            if at > 0 {
                made[at - 1] = self.pairs.get(ids[at - 1], ids[at]);
            }
            if at + 1 < length {
                made[at] = self.pairs.get(ids[at], ids[at + 1]);
            }
        }
        out.extend_from_slice(&ids[..length]);
    }

    /// The same with a heap and links to the neighbours: a chunk of a million letters takes a second, not days.
    fn merge_long(&self, chunk: &[u8], out: &mut Vec<u32>) {
        let mut ids: Vec<u32> = chunk.iter().map(|&byte| self.bytes[byte as usize]).collect();
        let mut next: Vec<usize> = (1..=ids.len()).collect(); // of a token that is gone: 0
        let mut previous: Vec<usize> = (0..ids.len()).map(|i| i.wrapping_sub(1)).collect();
        let mut heap = BinaryHeap::new();
        let offer = |heap: &mut BinaryHeap<_>, ids: &[u32], left: usize, right: usize| {
            let id = self.pairs.get(ids[left], ids[right]);
            if id != NONE {
                heap.push(Reverse((id, left, ids[left], right, ids[right])));
            }
        };
        for i in 1..ids.len() {
            offer(&mut heap, &ids, i - 1, i);
        }
        while let Some(Reverse((id, left, left_id, right, right_id))) = heap.pop() {
            if next[left] != right || ids[left] != left_id || ids[right] != right_id {
                continue; // one of the two has been merged since
            }
            let after = next[right];
            (ids[left], next[left], next[right], ids[right]) = (id, after, 0, NONE);
            if after < ids.len() {
                previous[after] = left;
                offer(&mut heap, &ids, left, after);
            }
            if previous[left] < ids.len() {
                offer(&mut heap, &ids, previous[left], left);
            }
        }
        let mut at = 0;
        while at < ids.len() {
            out.push(ids[at]);
            at = next[at];
        }
    }
}

/// Two ids to the one that they make: open addressing over powers of two.
struct Pairs {
    slots: Vec<(u64, u32)>,
    used: usize,
}

impl Default for Pairs {
    fn default() -> Self {
        Pairs { slots: vec![(u64::MAX, NONE); 1 << 10], used: 0 }
    }
}

impl Pairs {
    #[inline(always)]
    fn slot(&self, key: u64) -> usize {
        let mask = self.slots.len() - 1;
        let mixed = key.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mut slot = (mixed ^ mixed >> 32) as usize & mask;
        while self.slots[slot].0 != key && self.slots[slot].0 != u64::MAX {
            slot = (slot + 1) & mask;
        }
        slot
    }

    #[inline(always)]
    fn get(&self, left: u32, right: u32) -> u32 {
        self.slots[self.slot((left as u64) << 32 | right as u64)].1
    }

    fn insert(&mut self, left: u32, right: u32, id: u32) {
        let key = (left as u64) << 32 | right as u64;
        let slot = self.slot(key);
        self.slots[slot] = (key, id);
        self.used += 1;
        if 2 * self.used > self.slots.len() {
            let bigger = vec![(u64::MAX, NONE); self.slots.len() * 4];
            for (key, id) in std::mem::replace(&mut self.slots, bigger) {
                if key != u64::MAX {
                    let slot = self.slot(key);
                    self.slots[slot] = (key, id);
                }
            }
        }
    }
}

/// A chunk of up to 15 bytes with its ids; more than three of them lie in `Memory::more`, from ids[0] on.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
struct Slot {
    key: u128, // 0 = free
    ids: [u32; 3],
    count: u32,
}

const FREE: Slot = Slot { key: 0, ids: [0; 3], count: 0 };

/// What one thread has encoded before.
struct Memory {
    short: Vec<Slot>,
    used: usize,
    long: FastMap<Box<[u8]>, (u32, u32)>, // where in `more`, and how many
    more: Vec<u32>,
}

impl Default for Memory {
    fn default() -> Self {
        Memory { short: vec![FREE; 1 << 14], used: 0, long: FastMap::default(), more: vec![] }
    }
}

impl Memory {
    #[inline(always)]
    fn find(&self, key: u128) -> usize {
        let mask = self.short.len() - 1;
        let mut slot = hash(key) & mask;
        loop {
            let found = self.short[slot].key;
            if found == key || found == 0 {
                return slot;
            }
            slot = (slot + 1) & mask;
        }
    }

    /// Appends the ids of the chunk of up to 15 bytes that is `key`.
    #[inline(always)]
    fn encode_short(&mut self, key: u128, vocabulary: &Vocabulary, out: &mut Vec<u32>) {
        let slot = self.short[self.find(key)];
        if slot.key == key && slot.count <= 3 {
            out.reserve(3);
            // SAFETY: there is room for three more ids, and `count` is at most three. Copying all three and counting
            // some of them is faster than a copy of unknown length.
            unsafe {
                out.as_mut_ptr().add(out.len()).cast::<[u32; 3]>().write_unaligned(slot.ids);
                out.set_len(out.len() + slot.count as usize);
            }
        } else if slot.key == key {
            out.extend_from_slice(&self.more[slot.ids[0] as usize..][..slot.count as usize]);
        } else {
            self.learn_short(key, vocabulary, out);
        }
    }

    #[cold]
    #[inline(never)]
    fn learn_short(&mut self, key: u128, vocabulary: &Vocabulary, out: &mut Vec<u32>) {
        let start = out.len();
        vocabulary.encode_chunk(&key.to_le_bytes()[..(key >> 120) as usize], out);
        let found = &out[start..];
        let mut slot = Slot { key, ids: [0; 3], count: found.len() as u32 };
        if found.len() <= 3 {
            slot.ids[..found.len()].copy_from_slice(found);
        } else {
            slot.ids[0] = self.more.len() as u32;
            self.more.extend_from_slice(found);
        }
        let at = self.find(key);
        self.short[at] = slot;
        self.used += 1;
        if 2 * self.used > self.short.len() {
            self.grow();
        }
    }

    fn grow(&mut self) {
        if self.short.len() >= MAX_SLOTS {
            *self = Memory::default();
            return;
        }
        let bigger = vec![FREE; self.short.len() * 4];
        for slot in std::mem::replace(&mut self.short, bigger) {
            if slot.key != 0 {
                let at = self.find(slot.key);
                self.short[at] = slot;
            }
        }
    }

    #[inline(never)]
    fn encode_long(&mut self, chunk: &[u8], vocabulary: &Vocabulary, out: &mut Vec<u32>) {
        if let Some(&(start, count)) = self.long.get(chunk) {
            return out.extend_from_slice(&self.more[start as usize..][..count as usize]);
        }
        let before = out.len();
        vocabulary.encode_chunk(chunk, out);
        if chunk.len() <= LONG_CHUNK {
            if self.long.len() >= MAX_LONG {
                *self = Memory::default();
            }
            self.long.insert(chunk.into(), (self.more.len() as u32, (out.len() - before) as u32));
            self.more.extend_from_slice(&out[before..]);
        }
    }
}

/// A vocabulary, a way to cut text, and the memories of the threads that are not at work at the moment.
pub struct Encoder {
    vocabulary: Vocabulary,
    splitter: Splitter,
    memories: Mutex<Vec<Memory>>,
}

impl Encoder {
    pub fn new(tokens: &[Vec<u8>], pattern: Option<&str>) -> Result<Encoder, String> {
        Ok(Encoder { vocabulary: Vocabulary::new(tokens)?, splitter: Splitter::new(pattern)?, memories: Mutex::default() })
    }

    fn with_memory<T>(&self, work: impl FnOnce(&mut Memory) -> T) -> T {
        let idle = self.memories.lock().ok().and_then(|mut idle| idle.pop());
        let mut memory = idle.unwrap_or_default();
        let done = work(&mut memory);
        if let Ok(mut idle) = self.memories.lock() {
            idle.push(memory);
        }
        done
    }

    /// Appends the ids of `text`.
    pub fn encode(&self, text: &str, out: &mut Vec<u32>) -> Result<(), String> {
        self.with_memory(|memory| self.encode_with(memory, text, out))
    }

    fn encode_with(&self, memory: &mut Memory, text: &str, out: &mut Vec<u32>) -> Result<(), String> {
        let bytes = text.as_bytes();
        let mut waiting = Waiting::default();
        self.splitter.for_each(text, |start, end| {
            let key = chunk_key(bytes, start, end);
            if key.is_some_and(|key| !waiting.push(key, &memory.short)) {
                return;
            }
            for &key in waiting.take() {
                memory.encode_short(key, &self.vocabulary, out);
            }
            if key.is_none() {
                memory.encode_long(&bytes[start..end], &self.vocabulary, out);
            }
        })?;
        for &key in waiting.take() {
            memory.encode_short(key, &self.vocabulary, out);
        }
        Ok(())
    }

    /// The ids of several texts one after the other, and how many each has. Every thread takes a part of about equal size.
    pub fn encode_batch(&self, texts: &[&str], prepend: Option<u32>, threads: usize) -> Result<Vec<(Vec<u32>, Vec<usize>)>, String> {
        let total: usize = texts.iter().map(|text| text.len() + 8).sum();
        let share = total / threads.max(1) + 1;
        let (mut parts, mut start, mut size) = (vec![], 0, 0);
        for (i, text) in texts.iter().enumerate() {
            size += text.len() + 8;
            if size >= share || i + 1 == texts.len() {
                parts.push(&texts[start..=i]);
                (start, size) = (i + 1, 0);
            }
        }
        let encode = |part: &[&str]| {
            self.with_memory(|memory| {
                let bytes: usize = part.iter().map(|text| text.len()).sum();
                let (mut ids, mut counts) = (Vec::with_capacity(bytes / 4), Vec::with_capacity(part.len()));
                for text in part {
                    let before = ids.len();
                    ids.extend(prepend);
                    self.encode_with(memory, text, &mut ids)?;
                    counts.push(ids.len() - before);
                }
                Ok((ids, counts))
            })
        };
        if let [part] = parts[..] {
            return Ok(vec![encode(part)?]);
        }
        std::thread::scope(|scope| {
            let workers: Vec<_> = parts.iter().map(|&part| scope.spawn(move || encode(part))).collect();
            workers.into_iter().map(|worker| worker.join().map_err(|_| "an encoding thread failed".to_string())?).collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rule, word for word.
    fn slow(tokens: &[Vec<u8>], chunk: &[u8]) -> Vec<u32> {
        let rank = |bytes: &[u8]| tokens.iter().position(|token| token == bytes);
        if let Some(id) = rank(chunk) {
            return vec![id as u32];
        }
        let mut parts: Vec<Vec<u8>> = chunk.iter().map(|&byte| vec![byte]).collect();
        while let Some((_, i)) = parts.windows(2).enumerate().filter_map(|(i, two)| Some((rank(&two.concat())?, i))).min() {
            let right = parts.remove(i + 1);
            parts[i].extend(right);
        }
        parts.iter().map(|part| rank(part).unwrap() as u32).collect()
    }

    fn random() -> impl FnMut() -> usize {
        let mut state = 88_172_645_463_325_252u64;
        move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as usize
        }
    }

    #[test]
    fn short_and_long_merges_follow_the_rule_on_random_vocabularies() {
        let mut random = random();
        for round in 0..60 {
            let letters = 1 + round % 4;
            let mut tokens: Vec<Vec<u8>> = (0..=255u8).map(|byte| vec![byte]).collect();
            for _ in 0..random() % 60 {
                let (left, right) = (random() % tokens.len(), random() % tokens.len());
                let pick = |i: usize| if i < 256 { vec![b'a' + (i % letters) as u8] } else { tokens[i].clone() };
                let token = [pick(left), pick(right)].concat();
                if !tokens.contains(&token) {
                    tokens.push(token);
                }
            }
            let vocabulary = Vocabulary::new(&tokens).unwrap();
            for _ in 0..40 {
                let chunk: Vec<u8> = (0..1 + random() % 40).map(|_| b'a' + (random() % letters) as u8).collect();
                let expected = slow(&tokens, &chunk);
                let (mut short, mut long) = (vec![], vec![]);
                vocabulary.encode_chunk(&chunk, &mut short);
                assert_eq!(short, expected);
                if !vocabulary.ids.contains_key(chunk.as_slice()) {
                    vocabulary.merge_long(&chunk, &mut long);
                    assert_eq!(long, expected);
                }
            }
        }
    }

    #[test]
    fn what_is_remembered_equals_what_is_computed_also_after_forgetting() {
        let mut random = random();
        let tokens: Vec<Vec<u8>> = (0..=255u8).map(|byte| vec![byte]).chain([b"ab".to_vec(), b"abc".to_vec(), b" a".to_vec()]).collect();
        let encoder = Encoder::new(&tokens, None).unwrap();
        let alphabet: Vec<char> = "abcdefgh  AZ19.,'s\n\té中😀".chars().collect();
        for round in 0..3000 {
            let text: String = (0..random() % 400).map(|_| alphabet[random() % alphabet.len()]).collect();
            if round % 500 == 0 {
                encoder.memories.lock().unwrap().clear();
            }
            let (mut ids, mut expected) = (vec![], vec![]);
            encoder.encode(&text, &mut ids).unwrap();
            Splitter::Builtin.for_each(&text, |start, end| encoder.vocabulary.encode_chunk(&text.as_bytes()[start..end], &mut expected)).unwrap();
            assert_eq!(ids, expected, "{text:?}");
        }
        let mut memory = Memory { used: MAX_SLOTS / 2, short: vec![FREE; MAX_SLOTS], ..Memory::default() };
        let mut ids = vec![];
        encoder.encode_with(&mut memory, "abc abc", &mut ids).unwrap();
        assert_eq!((ids, memory.used), (vec![257, 32, 257], 1)); // full at the first chunk, empty, then one
    }

    #[test]
    fn a_batch_has_the_ids_of_its_texts_in_any_number_of_threads() {
        let tokens: Vec<Vec<u8>> = (0..=255u8).map(|byte| vec![byte]).chain([b"th".to_vec()]).collect();
        let encoder = Encoder::new(&tokens, None).unwrap();
        let texts = ["the", "", "a longer text than the others", "th th"];
        let one: Vec<u32> = texts.iter().flat_map(|text| { let mut ids = vec![7]; encoder.encode(text, &mut ids).unwrap(); ids }).collect();
        for threads in 1..6 {
            let parts = encoder.encode_batch(&texts, Some(7), threads).unwrap();
            assert_eq!(parts.iter().flat_map(|(ids, _)| ids.clone()).collect::<Vec<_>>(), one);
            assert_eq!(parts.iter().map(|(_, counts)| counts.len()).sum::<usize>(), 4);
        }
    }
}
