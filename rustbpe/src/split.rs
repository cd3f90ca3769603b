//! Text to chunks. No token ever crosses the border of a chunk.
//!
//! `PATTERN` is the definition. A regular expression engine follows it at about 18 MB/s; most of that
//! time is backtracking that this pattern never needs. `chunk_end` is the same definition written as a
//! handful of loops. The tests below hold the two together on every code point and on random text.

use crate::key::KEY_BYTES;
use std::sync::OnceLock;

/// GPT-4's pattern (cl100k_base) with one change: numbers come in twos, `{1,2}`, not in threes.
pub const PATTERN: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

const OTHER: u8 = 0;
const LETTER: u8 = 1;
const NUMBER: u8 = 2;
const SPACE: u8 = 3; // white space except the two below
const NEWLINE: u8 = 4; // \r and \n

/// The class of every code point, one byte each, filled from the tables of the regex crates.
pub struct Classes(Box<[u8]>);

impl Classes {
    pub fn get() -> &'static Classes {
        static CLASSES: OnceLock<Classes> = OnceLock::new();
        CLASSES.get_or_init(|| {
            let mut table = vec![OTHER; 0x11_0000].into_boxed_slice();
            for (pattern, class) in [(r"\p{L}", LETTER), (r"\p{N}", NUMBER), (r"\s", SPACE), (r"[\r\n]", NEWLINE)] {
                let hir = regex_syntax::parse(pattern).expect("a fixed pattern");
                let regex_syntax::hir::HirKind::Class(regex_syntax::hir::Class::Unicode(set)) = hir.kind() else {
                    unreachable!("a character class")
                };
                for range in set.ranges() {
                    table[range.start() as usize..=range.end() as usize].fill(class);
                }
            }
            Classes(table)
        })
    }

    /// Class and width in bytes of the character at `at`, which must start a character of valid UTF-8.
    #[inline(always)]
    fn at(&self, text: &[u8], at: usize) -> (u8, usize) {
        let first = text[at];
        if first < 0x80 {
            return (self.0[first as usize], 1);
        }
        let low = |i: usize| (text[at + i] & 0x3F) as usize;
        match first {
            ..0xE0 => (self.0[(first as usize & 0x1F) << 6 | low(1)], 2),
            ..0xF0 => (self.0[(first as usize & 0x0F) << 12 | low(1) << 6 | low(2)], 3),
            _ => (self.0[(first as usize & 0x07) << 18 | low(1) << 12 | low(2) << 6 | low(3)], 4),
        }
    }

    #[inline(always)]
    fn is(&self, text: &[u8], at: usize, class: u8) -> bool {
        at < text.len() && self.at(text, at).0 == class
    }

    /// The end of the run of `class` that starts at `at` (`at` itself when there is none).
    #[inline(always)]
    fn run(&self, text: &[u8], mut at: usize, class: u8) -> usize {
        while at < text.len() {
            let (found, width) = self.at(text, at);
            if found != class {
                break;
            }
            at += width;
        }
        at
    }

    /// Where the chunk that starts at `start` ends. Each block is one alternative of `PATTERN`, in order.
    pub fn chunk_end(&self, text: &[u8], start: usize) -> usize {
        let (class, width) = self.at(text, start);
        let next = start + width;

        // '(?i:[sdmt]|ll|ve|re)
        if text[start] == b'\'' {
            if let Some(length) = contraction(&text[next..]) {
                return next + length;
            }
        }
        // [^\r\n\p{L}\p{N}]?+\p{L}+
        if class == LETTER {
            return self.run(text, next, LETTER);
        }
        if (class == OTHER || class == SPACE) && self.is(text, next, LETTER) {
            return self.run(text, next, LETTER);
        }
        // \p{N}{1,2}
        if class == NUMBER {
            return if self.is(text, next, NUMBER) { next + self.at(text, next).1 } else { next };
        }
        //  ?[^\s\p{L}\p{N}]++[\r\n]*
        let body = if text[start] == b' ' { next } else { start };
        let body_end = self.run(text, body, OTHER);
        if body_end > body {
            return self.run(text, body_end, NEWLINE);
        }
        // \s*[\r\n]|\s+(?!\S)|\s+
        self.white_space_end(text, start)
    }

    fn white_space_end(&self, text: &[u8], start: usize) -> usize {
        let (mut at, mut last_start, mut after_newline) = (start, start, None);
        while at < text.len() {
            let (class, width) = self.at(text, at);
            if class != SPACE && class != NEWLINE {
                break;
            }
            last_start = at;
            at += width;
            if class == NEWLINE {
                after_newline = Some(at);
            }
        }
        match after_newline {
            Some(end) => end,                                            // \s*[\r\n]: to the last line end of the run
            None if at < text.len() && last_start > start => last_start, // \s+(?!\S): leave one for the next word
            None => at,
        }
    }
}

/// Length of what follows the apostrophe in 's 'd 'm 't 'll 've 're, in any case.
/// U+017F, the long s, is a small s to a case-insensitive regular expression.
#[inline(always)]
fn contraction(rest: &[u8]) -> Option<usize> {
    let letter = |i: usize| rest.get(i).map_or(0, |byte| byte.to_ascii_lowercase());
    match (letter(0), letter(1)) {
        (b's' | b'd' | b'm' | b't', _) => Some(1),
        (b'l', b'l') | (b'v', b'e') | (b'r', b'e') => Some(2),
        _ if rest.starts_with("ſ".as_bytes()) => Some(2),
        _ => None,
    }
}

/// Classes of the ASCII characters, for `fast_chunk`.
const ASCII: [u8; 128] = {
    let mut table = [OTHER; 128];
    let mut c = 0;
    while c < 128 {
        table[c] = match c as u8 {
            b'A'..=b'Z' | b'a'..=b'z' => LETTER,
            b'0'..=b'9' => NUMBER,
            b'\n' | b'\r' => NEWLINE,
            b' ' | 0x09..=0x0D => SPACE,
            _ => OTHER,
        };
        c += 1;
    }
    table
};

/// Length of the chunk at the start of `window` when that can be told from these 16 bytes by a few comparisons;
/// None says: ask `chunk_end`. These are nine chunks of ten in English text: a word of ASCII letters with what stands
/// before it, a punctuation mark, one or two digits.
#[inline(always)]
pub fn fast_chunk(window: &[u8; KEY_BYTES]) -> Option<usize> {
    let first = *ASCII.get(window[0] as usize)?;
    let letters = letter_bits(window);
    if first == LETTER || letters & 2 != 0 && first != NUMBER && first != NEWLINE && window[0] != b'\'' {
        let length = (letters | 1).trailing_ones() as usize;
        return (length < KEY_BYTES && window[length] < 0x80).then_some(length); // another letter might follow
    }
    let second = *ASCII.get(window[1] as usize)?;
    match (first, second) {
        (NUMBER, NUMBER) => Some(2),
        (NUMBER, _) | (OTHER, SPACE | NUMBER) | (SPACE, NUMBER) => Some(1),
        _ => None,
    }
}

/// Bit i tells whether byte i is an ASCII letter.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn letter_bits(window: &[u8; KEY_BYTES]) -> u32 {
    use std::arch::x86_64::*;
    // SAFETY: every x86-64 has SSE2; the load needs no alignment and stays within the window.
    unsafe {
        let lower = _mm_or_si128(_mm_loadu_si128(window.as_ptr().cast()), _mm_set1_epi8(0x20));
        let place = _mm_sub_epi8(lower, _mm_set1_epi8(b'a' as i8));
        _mm_movemask_epi8(_mm_cmpeq_epi8(_mm_min_epu8(place, _mm_set1_epi8(25)), place)) as u32
    }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn letter_bits(window: &[u8; KEY_BYTES]) -> u32 {
    window.iter().enumerate().fold(0, |bits, (i, byte)| bits | (byte.is_ascii_alphabetic() as u32) << i)
}

/// How to cut text: by hand for the built-in pattern, by a regular expression for any other.
pub enum Splitter {
    Builtin,
    Regex(Box<fancy_regex::Regex>),
}

impl Splitter {
    pub fn new(pattern: Option<&str>) -> Result<Splitter, String> {
        match pattern {
            None | Some(PATTERN) => Ok(Splitter::Builtin),
            Some(pattern) => match fancy_regex::Regex::new(pattern) {
                Ok(regex) => Ok(Splitter::Regex(Box::new(regex))),
                Err(error) => Err(format!("split pattern {pattern:?}: {error}")),
            },
        }
    }

    /// A splitter for another thread. A compiled regex keeps a pool of scratch memory, and threads that
    /// share one wait for each other on every match; so it is compiled again.
    pub fn for_thread(&self) -> Result<Splitter, String> {
        match self {
            Splitter::Builtin => Ok(Splitter::Builtin),
            Splitter::Regex(regex) => Splitter::new(Some(regex.as_str())),
        }
    }

    /// Calls `each(start, end)` for the chunks of `text`, in order.
    pub fn for_each(&self, text: &str, mut each: impl FnMut(usize, usize)) -> Result<(), String> {
        match self {
            Splitter::Builtin => {
                let (classes, bytes) = (Classes::get(), text.as_bytes());
                let mut start = 0;
                while start < bytes.len() {
                    let window = bytes.get(start..start + KEY_BYTES).and_then(|window| fast_chunk(window.try_into().expect("16 bytes")));
                    let end = window.map_or_else(|| classes.chunk_end(bytes, start), |length| start + length);
                    each(start, end);
                    start = end;
                }
            }
            Splitter::Regex(regex) => {
                for found in regex.find_iter(text) {
                    let found = found.map_err(|error| format!("split pattern: {error}"))?;
                    if found.end() > found.start() {
                        each(found.start(), found.end());
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunks<'a>(splitter: &Splitter, text: &'a str) -> Vec<&'a str> {
        let mut found = vec![];
        splitter.for_each(text, |start, end| found.push(&text[start..end])).unwrap();
        found
    }

    fn engine() -> Splitter {
        Splitter::Regex(Box::new(fancy_regex::Regex::new(PATTERN).unwrap()))
    }

    #[test]
    fn every_code_point_is_cut_as_the_regex_cuts_it() {
        let engine = engine();
        for c in (0..=0x10_FFFF).filter_map(char::from_u32) {
            let text = format!("{c}a {c}{c}1{c}'{c} {c}\n{c}  {c}!{c}");
            assert_eq!(chunks(&Splitter::Builtin, &text), chunks(&engine, &text), "{:?} {text:?}", c as u32);
        }
    }

    #[test]
    fn random_text_is_cut_as_the_regex_cuts_it() {
        let alphabet: Vec<char> = "aZé中'''sSdDmMtTlLvVeErRſ019²٣Ⅷ   \t\n\r\u{a0}\u{3000}\u{85}.!-_😀\u{301}\0\u{feff}".chars().collect();
        let engine = engine();
        let number = |name: &str, default: u64| std::env::var(name).map_or(default, |text| text.parse().expect("a number"));
        let mut state = 0x9E37_79B9_7F4A_7C15u64 ^ number("RUSTBPE_SEED", 0);
        let mut random = || {
            // xorshift64: enough to visit the corners
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as usize
        };
        // RUSTBPE_TEXTS=10000000 takes some minutes; lengths on both sides of the 16 bytes that fast_chunk sees; now and then a character of any kind
        for _ in 0..number("RUSTBPE_TEXTS", 200_000) {
            let mut character = || match random() % 8 {
                0 => char::from_u32(random() as u32 % 0x11_0000).unwrap_or('a'),
                _ => alphabet[random() % alphabet.len()],
            };
            let text: String = (0..40).map(|_| character()).collect();
            let text: String = text.chars().take(random() % 41).collect();
            assert_eq!(chunks(&Splitter::Builtin, &text), chunks(&engine, &text), "{text:?}");
        }
    }
}
