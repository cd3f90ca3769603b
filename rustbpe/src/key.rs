//! A chunk of up to 15 bytes as one number: the bytes, zeros, the length in the last byte. Nearly all chunks are so
//! short; as numbers they are compared in one step and lie in a table themselves, so that no pointer is followed.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// A key is read with one load of so many bytes.
pub const KEY_BYTES: usize = 16;

/// The key of the first `length` < 16 bytes of `window`.
#[inline(always)]
pub fn short_key(window: &[u8; KEY_BYTES], length: usize) -> u128 {
    u128::from_le_bytes(*window) & MASKS[length] | (length as u128) << 120
}

/// The key of a chunk that may lie at the end of the text; None if it has more than 15 bytes.
#[inline(always)]
pub fn chunk_key(text: &[u8], start: usize, end: usize) -> Option<u128> {
    if end - start >= KEY_BYTES {
        return None;
    }
    if let Some(window) = text.get(start..start + KEY_BYTES) {
        return Some(short_key(window.try_into().expect("16 bytes"), end - start));
    }
    let mut window = [0; KEY_BYTES];
    window[..end - start].copy_from_slice(&text[start..end]);
    Some(short_key(&window, end - start))
}

/// One product of both halves mixes all 128 bits (the idea of wyhash).
#[inline(always)]
pub fn hash(key: u128) -> usize {
    let mixed = (key as u64 ^ 0xA076_1D64_78BD_642F) as u128 * ((key >> 64) as u64 ^ 0xE703_7ED1_A0B4_28DB) as u128;
    (mixed as u64 ^ (mixed >> 64) as u64) as usize
}

/// Keys that are cut but not yet looked up. Waiting for memory is most of the cost of a look into a large table, and 64
/// waits that overlap are not much longer than one: `push` asks for the place of a key, `take` gives all keys back.
pub struct Waiting {
    keys: [u128; 64],
    count: usize,
}

impl Default for Waiting {
    fn default() -> Self {
        Waiting { keys: [0; 64], count: 0 }
    }
}

impl Waiting {
    /// True when it is time to take the keys.
    #[inline(always)]
    pub fn push<T>(&mut self, key: u128, table: &[T]) -> bool {
        prefetch(table, hash(key) & (table.len() - 1));
        self.keys[self.count] = key;
        self.count += 1;
        self.count == self.keys.len()
    }

    #[inline(always)]
    pub fn take(&mut self) -> &[u128] {
        &self.keys[..std::mem::take(&mut self.count)]
    }
}

/// Asks for the cache line of a place in a table.
#[inline(always)]
fn prefetch<T>(table: &[T], place: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch is a hint and may name any address; this one is within the table.
    unsafe {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        _mm_prefetch::<_MM_HINT_T0>(table.as_ptr().add(place).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (table, place);
}

/// For small keys of our own making, which nobody chooses to make our tables slow: a rotation and a product a step.
#[derive(Default)]
pub struct FastHasher(u64);

pub type FastMap<K, V> = HashMap<K, V, BuildHasherDefault<FastHasher>>;

impl Hasher for FastHasher {
    fn write(&mut self, bytes: &[u8]) {
        let mut words = bytes.chunks_exact(8);
        for word in &mut words {
            self.write_u64(u64::from_le_bytes(word.try_into().expect("8 bytes")));
        }
        let mut last = [0; 8];
        last[..words.remainder().len()].copy_from_slice(words.remainder());
        self.write_u64(u64::from_le_bytes(last));
    }
    fn write_u8(&mut self, value: u8) {
        self.write_u64(value as u64);
    }
    fn write_u32(&mut self, value: u32) {
        self.0 = (self.0.rotate_left(32) ^ value as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(29) ^ value).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }
    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }
}

const MASKS: [u128; KEY_BYTES] = {
    let mut masks = [0; KEY_BYTES];
    let mut length = 1;
    while length < KEY_BYTES {
        masks[length] = masks[length - 1] << 8 | 0xFF;
        length += 1;
    }
    masks
};
