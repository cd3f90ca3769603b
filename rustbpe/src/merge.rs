//! Counted chunks to merges.
//!
//! The rule, the same as in the notebook: take the most frequent pair of neighbouring ids (equal counts:
//! the pair with the smaller left id, then the smaller right id), give it the next id, replace it
//! everywhere from left to right, repeat.
//!
//! Only the neighbours of a merged pair change their counts, so nothing is ever counted twice:
//! * All chunks lie in one array, one cell a byte. A token writes its id into its first and its last
//!   cell, so both neighbours are found in one step and nothing moves when tokens grow.
//! * Each pair keeps its count and the places where it was seen. A place may have gone stale; one look at
//!   the array tells. All places of a pair are found within one step, in ascending order.
//! * The heap may hold counts that are too high, never too low: a pair whose count has fallen goes back in.

use crate::count::Counts;
use crate::key::FastMap;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

pub type Pair = (u32, u32);

const NONE: u32 = u32::MAX; // between two chunks, and in the inner cells of long tokens
const LIMIT: usize = u32::MAX as usize - 1;

#[derive(Default)]
struct Occurrences {
    count: i64,
    places: Vec<u32>,
}

pub struct Trainer {
    ids: Vec<u32>,      // NONE, then for each chunk its cells and a NONE
    weights: Vec<u64>,  // for each cell, how often its chunk occurs
    lengths: Vec<u32>,  // for each id, its cells
    pairs: FastMap<Pair, Occurrences>,
    heap: BinaryHeap<(i64, Reverse<Pair>)>,
    before: Vec<Occurrences>, // for each id: what the merge at hand found to its left ...
    after: Vec<Occurrences>,  // ... and to its right
    touched: (Vec<u32>, Vec<u32>),
}

impl Trainer {
    pub fn new(counts: Counts) -> Result<Trainer, String> {
        let mut trainer = Trainer {
            ids: vec![NONE],
            weights: vec![0],
            lengths: vec![1; 256],
            pairs: FastMap::default(),
            heap: BinaryHeap::new(),
            before: vec![],
            after: vec![],
            touched: (vec![], vec![]),
        };
        counts.for_each(|chunk, count| {
            if chunk.len() > 1 {
                trainer.ids.extend(chunk.iter().map(|&byte| byte as u32));
                trainer.ids.push(NONE);
                trainer.weights.resize(trainer.ids.len(), count);
            }
        });
        if trainer.ids.len() > LIMIT {
            return Err("the distinct chunks of this corpus have more than 4 GB: train on less text".into());
        }
        trainer.count_byte_pairs();
        Ok(trainer)
    }

    /// There are only 65,536 pairs of bytes: a table finds them faster than a hash map.
    fn count_byte_pairs(&mut self) {
        let mut table: Vec<Occurrences> = (0..1 << 16).map(|_| Occurrences::default()).collect();
        for (place, two) in self.ids.windows(2).enumerate() {
            if two[0] != NONE && two[1] != NONE {
                let seen = &mut table[(two[0] << 8 | two[1]) as usize];
                seen.count += self.weights[place] as i64;
                seen.places.push(place as u32);
            }
        }
        for (index, seen) in table.into_iter().enumerate() {
            self.add_pair((index as u32 >> 8, index as u32 & 255), seen);
        }
    }

    fn add_pair(&mut self, pair: Pair, seen: Occurrences) {
        if seen.count > 0 {
            self.heap.push((seen.count, Reverse(pair)));
            self.pairs.insert(pair, seen);
        }
    }

    /// Finds the best pair, merges it everywhere and returns it; None when no pair is left.
    pub fn step(&mut self) -> Option<Pair> {
        while let Some((count, Reverse(pair))) = self.heap.pop() {
            let live = self.pairs.get(&pair).map_or(0, |seen| seen.count);
            if live == count {
                let seen = self.pairs.remove(&pair)?;
                self.merge(pair, &seen.places);
                return Some(pair);
            }
            if live > 0 {
                self.heap.push((live, Reverse(pair)));
            } else {
                self.pairs.remove(&pair);
            }
        }
        None
    }

    fn merge(&mut self, pair: Pair, places: &[u32]) {
        let new_id = self.lengths.len() as u32;
        let (left_length, right_length) = (self.lengths[pair.0 as usize] as usize, self.lengths[pair.1 as usize] as usize);
        self.lengths.push((left_length + right_length) as u32);
        self.before.resize_with(self.lengths.len(), Occurrences::default);
        self.after.resize_with(self.lengths.len(), Occurrences::default);

        for &place in places {
            let start = place as usize;
            let middle = start + left_length;
            if self.ids[start] != pair.0 || self.ids.get(middle) != Some(&pair.1) {
                continue; // stale: one of the two has been merged with something else
            }
            let end = middle + right_length;
            let weight = self.weights[start] as i64;
            let left = self.ids[start - 1];
            if left != NONE {
                let seen = note(&mut self.before, &mut self.touched.0, left, weight);
                seen.places.push((start - self.lengths[left as usize] as usize) as u32);
            }
            let right = self.ids[end];
            if right != NONE {
                let seen = note(&mut self.after, &mut self.touched.1, right, weight);
                seen.places.push(place);
            }
            self.ids[middle - 1] = NONE;
            self.ids[middle] = NONE;
            self.ids[start] = new_id;
            self.ids[end - 1] = new_id;
        }
        self.update_neighbours(pair, new_id);
    }

    /// Turns what `merge` noted into pairs: (left, pair.0) became (left, new), (pair.1, right) became (new, right).
    fn update_neighbours(&mut self, pair: Pair, new_id: u32) {
        let (lefts, rights) = std::mem::take(&mut self.touched);
        for &right in &rights {
            let seen = std::mem::take(&mut self.after[right as usize]);
            self.reduce((pair.1, right), seen.count);
            self.pairs.insert((new_id, right), seen);
        }
        for &left in &lefts {
            let seen = std::mem::take(&mut self.before[left as usize]);
            self.reduce((left, pair.0), seen.count); // after the loop above: (new, pair.0) may come from it
            self.pairs.insert((left, new_id), seen);
        }
        let created = lefts.iter().map(|&left| (left, new_id)).chain(rights.iter().map(|&right| (new_id, right)));
        for pair in created {
            match self.pairs.get(&pair) {
                Some(seen) if seen.count > 0 => self.heap.push((seen.count, Reverse(pair))),
                _ => {
                    self.pairs.remove(&pair);
                }
            }
        }
        self.touched = (lefts, rights);
        self.touched.0.clear();
        self.touched.1.clear();
    }

    fn reduce(&mut self, pair: Pair, count: i64) {
        if let Some(seen) = self.pairs.get_mut(&pair) {
            seen.count -= count;
            if seen.count == 0 {
                seen.places = vec![]; // give the memory back now; the heap drops the pair later
            }
        }
    }
}

fn note<'a>(table: &'a mut [Occurrences], touched: &mut Vec<u32>, id: u32, weight: i64) -> &'a mut Occurrences {
    let seen = &mut table[id as usize];
    if seen.count == 0 {
        touched.push(id);
    }
    seen.count += weight;
    seen
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    /// The rule, word for word: count everything again after every merge.
    fn recount(chunks: &[(Vec<u8>, u64)], merges: usize) -> Vec<Pair> {
        let mut words: Vec<(Vec<u32>, u64)> = chunks.iter().map(|(chunk, count)| (chunk.iter().map(|&b| b as u32).collect(), *count)).collect();
        let mut found = vec![];
        while found.len() < merges {
            let mut counts = HashMap::<Pair, u64>::new();
            for (ids, count) in &words {
                for two in ids.windows(2) {
                    *counts.entry((two[0], two[1])).or_default() += count;
                }
            }
            let Some((&pair, _)) = counts.iter().max_by_key(|(&pair, &count)| (count, Reverse(pair))) else { break };
            for (ids, _) in &mut words {
                let mut merged = vec![];
                let mut i = 0;
                while i < ids.len() {
                    if i + 1 < ids.len() && (ids[i], ids[i + 1]) == pair {
                        merged.push(256 + found.len() as u32);
                        i += 2;
                    } else {
                        merged.push(ids[i]);
                        i += 1;
                    }
                }
                *ids = merged;
            }
            found.push(pair);
        }
        found
    }

    #[test]
    fn merges_equal_a_recount_on_random_chunks() {
        let mut state = 88_172_645_463_325_252u64;
        let mut random = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as usize
        };
        for round in 0..400 {
            let letters = 1 + round % 5; // one letter: only runs, the case that is easy to get wrong
            let mut chunks = HashMap::<Vec<u8>, u64>::new();
            for _ in 0..1 + random() % 40 {
                let chunk = (0..1 + random() % 24).map(|_| b'a' + (random() % letters) as u8).collect();
                *chunks.entry(chunk).or_default() += 1 + (random() % 4) as u64;
            }
            let chunks: Vec<_> = chunks.into_iter().collect();
            let mut counts = Counts::default();
            chunks.iter().for_each(|(chunk, count)| counts.add(chunk, *count));
            let mut trainer = Trainer::new(counts).unwrap();
            let fast: Vec<Pair> = std::iter::from_fn(|| trainer.step()).collect();
            assert_eq!(fast, recount(&chunks, usize::MAX), "{chunks:?}");
        }
    }
}
