//! Byte pair encoding for nanochat. `lib.rs` is what Python sees; the three steps are in the modules.

pub mod count;
pub mod encode;
pub mod key;
pub mod merge;
pub mod split;

#[cfg(feature = "python")]
mod python {
    use crate::count::{Batch, Counts};
    use crate::encode::Encoder as Core;
    use crate::merge::{Pair, Trainer};
    use crate::split::{Splitter, PATTERN};
    use pyo3::buffer::PyBuffer;
    use pyo3::exceptions::PyValueError;
    use pyo3::ffi;
    use pyo3::prelude::*;
    use pyo3::types::{PyBytes, PyDict, PyInt, PyList, PyString};
    use std::ffi::{c_int, c_void};
    use std::sync::mpsc::{sync_channel, Receiver};
    use std::sync::{Arc, Mutex};
    use std::thread;

    const BATCH_BYTES: usize = 1 << 22;

    /// Text is copied out of Python in batches of 4 MB while the other threads count: the queue holds at
    /// most one batch a thread, so memory is bounded by the distinct chunks, not by the corpus.
    fn count_chunks(texts: &Bound<'_, PyAny>, pattern: Option<&str>, progress: Option<&Bound<'_, PyAny>>) -> PyResult<Counts> {
        let splitter = Splitter::new(pattern).map_err(PyValueError::new_err)?;
        let threads = thread::available_parallelism().map_or(1, |n| n.get());
        let (sender, receiver) = sync_channel::<Batch>(threads);
        let receiver = Arc::new(Mutex::new(receiver));
        thread::scope(|scope| {
            let spawn = |queue: Arc<Mutex<Receiver<Batch>>>| scope.spawn(|| count_batches(queue, &splitter));
            let workers: Vec<_> = (0..threads).map(|_| spawn(receiver.clone())).collect();
            drop(receiver); // the workers own the queue: without them, sending fails instead of waiting for ever
            let fed = feed(texts, |batch| sender.send(batch).is_ok(), progress);
            drop(sender); // the workers see the end of the queue
            let counted = texts.py().detach(|| workers.into_iter().map(|worker| worker.join()).collect::<Vec<_>>());
            fed?;
            let mut total = Counts::default();
            for counts in counted {
                let counts = counts.map_err(|_| PyValueError::new_err("a counting thread failed"))?;
                let counts = counts.map_err(PyValueError::new_err)?;
                texts.py().detach(|| total.merge(counts));
            }
            Ok(total)
        })
    }

    fn count_batches(queue: Arc<Mutex<Receiver<Batch>>>, splitter: &Splitter) -> Result<Counts, String> {
        let splitter = splitter.for_thread()?;
        let (mut counts, mut failure) = (Counts::default(), None);
        loop {
            let Ok(received) = queue.lock().map(|receiver| receiver.recv()) else { break };
            let Ok(batch) = received else { break };
            if failure.is_none() {
                failure = counts.add_batch(&batch, &splitter).err(); // go on emptying the queue
            }
        }
        failure.map_or(Ok(counts), Err)
    }

    /// A Python string may hold half a surrogate pair, which is no character: it becomes U+FFFD, as in tiktoken.
    fn well_formed<'py>(text: &Bound<'py, PyString>) -> PyResult<Bound<'py, PyString>> {
        if text.to_str().is_ok() {
            return Ok(text.clone());
        }
        let bytes = text.call_method1("encode", ("utf-16", "surrogatepass"))?;
        Ok(bytes.call_method1("decode", ("utf-16", "replace"))?.cast_into()?)
    }

    /// Pulls strings from a Python iterator and hands them on in batches; stops at Ctrl-C.
    fn feed(texts: &Bound<'_, PyAny>, send: impl Fn(Batch) -> bool + Sync + Send, progress: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let py = texts.py();
        let (mut batch, mut bytes) = (Batch::default(), 0);
        for text in texts.try_iter()? {
            let text = text?;
            let text = text.cast::<PyString>().map_err(|_| {
                let kind = text.get_type().name().map_or("?".into(), |name| name.to_string());
                PyValueError::new_err(format!("texts must be strings, found {kind}"))
            })?;
            batch.push(well_formed(text)?.to_str()?);
            if batch.bytes() >= BATCH_BYTES {
                let full = std::mem::take(&mut batch);
                bytes += full.bytes();
                if !py.detach(|| send(full)) {
                    break;
                }
                py.check_signals()?;
                tell(progress, bytes, 0)?;
            }
        }
        if !batch.is_empty() {
            py.detach(|| send(batch));
        }
        Ok(())
    }

    /// Calls back with the bytes read and the merges made so far.
    fn tell(progress: Option<&Bound<'_, PyAny>>, bytes: usize, merges: usize) -> PyResult<()> {
        progress.map_or(Ok(()), |progress| progress.call1((bytes, merges)).map(|_| ()))
    }

    fn learn_merges(py: Python<'_>, counts: Counts, num_merges: usize, progress: Option<&Bound<'_, PyAny>>) -> PyResult<Vec<Pair>> {
        let mut trainer = py.detach(|| Trainer::new(counts)).map_err(PyValueError::new_err)?;
        let mut merges = vec![];
        while merges.len() < num_merges {
            let goal = num_merges.min(merges.len() + 256);
            let more = py.detach(|| {
                while merges.len() < goal {
                    match trainer.step() {
                        Some(pair) => merges.push(pair),
                        None => return false,
                    }
                }
                true
            });
            py.check_signals()?;
            tell(progress, 0, merges.len())?;
            if !more {
                break;
            }
        }
        py.detach(|| drop(trainer));
        Ok(merges)
    }

    /// Learn vocab_size - 256 merges from an iterable of strings. Returns a list of (left id, right id):
    /// ids 0 to 255 are the bytes, merge number i makes id 256 + i. The list is shorter when the text has
    /// no pair left to merge. `progress` is called now and then with the bytes read (0 once all are) and the merges made.
    #[pyfunction]
    #[pyo3(signature = (texts, vocab_size, pattern=None, progress=None))]
    fn train(texts: &Bound<'_, PyAny>, vocab_size: usize, pattern: Option<&str>, progress: Option<&Bound<'_, PyAny>>) -> PyResult<Vec<Pair>> {
        let num_merges = vocab_size.checked_sub(256).ok_or_else(|| PyValueError::new_err("vocab_size must be at least 256, one id for each byte"))?;
        let counts = count_chunks(texts, pattern, progress)?;
        learn_merges(texts.py(), counts, num_merges, progress)
    }

    /// The first half of train: how often each distinct chunk occurs, as a dict from bytes to int.
    #[pyfunction]
    #[pyo3(signature = (texts, pattern=None))]
    fn count<'py>(texts: &Bound<'py, PyAny>, pattern: Option<&str>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(texts.py());
        let mut result = Ok(());
        count_chunks(texts, pattern, None)?.for_each(|chunk, count| {
            if result.is_ok() {
                result = dict.set_item(PyBytes::new(texts.py(), chunk), count);
            }
        });
        result.map(|()| dict)
    }

    /// The second half of train: merges from a dict of chunk counts.
    #[pyfunction]
    fn merge(counts: &Bound<'_, PyDict>, num_merges: usize) -> PyResult<Vec<Pair>> {
        let mut total = Counts::default();
        for (chunk, count) in counts {
            let chunk = chunk.cast::<PyBytes>().map_err(|_| PyValueError::new_err("chunks must be bytes"))?.clone();
            let count: u64 = count.extract()?;
            if count > 0 && !chunk.as_bytes().is_empty() {
                total.add(chunk.as_bytes(), count);
            }
        }
        learn_merges(counts.py(), total, num_merges, None)
    }

    /// The chunks of one text.
    #[pyfunction]
    #[pyo3(signature = (text, pattern=None))]
    fn split<'py>(text: &Bound<'py, PyString>, pattern: Option<&str>) -> PyResult<Vec<Bound<'py, PyString>>> {
        let splitter = Splitter::new(pattern).map_err(PyValueError::new_err)?;
        let whole = well_formed(text)?;
        let py_text = whole.to_str()?;
        let mut chunks = vec![];
        let done = splitter.for_each(py_text, |start, end| chunks.push(PyString::new(text.py(), &py_text[start..end])));
        done.map(|()| chunks).map_err(PyValueError::new_err)
    }

    /// Text to ids with the ranks of a vocabulary: equal to tiktoken's ids, faster. `tokens` are the bytes of every
    /// token in the order of their ids; a text never yields anything else. Any number of threads may use one encoder.
    #[pyclass(frozen)]
    struct Encoder {
        core: Core,
        ids: Vec<Py<PyInt>>, // a Python number for each id, made once: a list of ids then only refers to them
    }

    #[pymethods]
    impl Encoder {
        #[new]
        #[pyo3(signature = (tokens, pattern=None))]
        fn new(py: Python<'_>, tokens: Vec<Vec<u8>>, pattern: Option<&str>) -> PyResult<Self> {
            let core = py.detach(|| Core::new(&tokens, pattern)).map_err(PyValueError::new_err)?;
            let ids = (0..tokens.len()).map(|id| PyInt::new(py, id).unbind()).collect();
            Ok(Encoder { core, ids })
        }

        /// The ids of one text. A text with half a surrogate pair raises UnicodeEncodeError.
        fn encode<'py>(&self, text: &Bound<'py, PyString>) -> PyResult<Bound<'py, PyList>> {
            let mut ids = vec![];
            let content = text.to_str()?;
            text.py().detach(|| self.core.encode(content, &mut ids)).map_err(PyValueError::new_err)?;
            self.list(text.py(), &ids)
        }

        /// A list of ids for each text; with `prepend`, that id before each.
        #[pyo3(signature = (texts, prepend=None, threads=1))]
        fn encode_batch<'py>(&self, py: Python<'py>, texts: Vec<Bound<'py, PyString>>, prepend: Option<u32>, threads: usize) -> PyResult<Bound<'py, PyList>> {
            let lists = PyList::empty(py);
            for (ids, counts) in self.batch(py, &texts, prepend, threads)? {
                let mut start = 0;
                for count in counts {
                    lists.append(self.list(py, &ids[start..start + count])?)?;
                    start += count;
                }
            }
            Ok(lists)
        }

        /// The ids of all texts one after the other and the number of ids of each, as buffers of unsigned 32-bit numbers:
        /// numpy.frombuffer makes arrays of them without a copy, and without an object for each id.
        #[pyo3(signature = (texts, prepend=None, threads=1))]
        fn encode_flat(&self, py: Python<'_>, texts: Vec<Bound<'_, PyString>>, prepend: Option<u32>, threads: usize) -> PyResult<(Numbers, Numbers)> {
            Ok(flat(self.batch(py, &texts, prepend, threads)?))
        }

        /// The same for texts that stand one after the other in one buffer of UTF-8, as in a string column of Arrow or
        /// Parquet: text i lies between offsets i and i + 1. No Python string is made. The buffer must not be changed meanwhile.
        #[pyo3(signature = (data, offsets, prepend=None, threads=1))]
        fn encode_utf8(&self, py: Python<'_>, data: PyBuffer<u8>, offsets: PyBuffer<i64>, prepend: Option<u32>, threads: usize) -> PyResult<(Numbers, Numbers)> {
            let offsets = offsets.to_vec(py)?;
            if data.dimensions() != 1 || !data.is_c_contiguous() {
                return Err(PyValueError::new_err("data must be contiguous bytes"));
            }
            // Safety: the view keeps the buffer alive, it is contiguous, and the caller leaves it unchanged.
            let bytes = unsafe { std::slice::from_raw_parts(data.buf_ptr() as *const u8, data.item_count()) };
            let parts = py.detach(|| {
                let texts = cut(bytes, &offsets)?;
                self.core.encode_batch(&texts, prepend, threads)
            });
            parts.map(flat).map_err(PyValueError::new_err)
        }
    }

    /// The texts between offsets of a buffer; the first that is not UTF-8, or not inside of it, is named.
    fn cut<'a>(bytes: &'a [u8], offsets: &[i64]) -> Result<Vec<&'a str>, String> {
        let text = |i: usize, start: i64, end: i64| {
            let part = usize::try_from(start).ok().zip(usize::try_from(end).ok()).and_then(|(start, end)| bytes.get(start..end));
            let part = part.ok_or_else(|| format!("text {i} lies outside of the buffer"))?;
            std::str::from_utf8(part).map_err(|_| format!("text {i} is not UTF-8"))
        };
        offsets.windows(2).enumerate().map(|(i, pair)| text(i, pair[0], pair[1])).collect()
    }

    /// The parts of a batch as one run of ids and one of counts.
    fn flat(parts: Vec<(Vec<u32>, Vec<usize>)>) -> (Numbers, Numbers) {
        let mut parts = parts.into_iter();
        let (mut ids, mut counts) = parts.next().unwrap_or_default();
        for (more_ids, more_counts) in parts {
            ids.extend(more_ids);
            counts.extend(more_counts);
        }
        (Numbers(ids), Numbers(counts.iter().map(|&count| count as u32).collect()))
    }

    /// Numbers that Python reads through the buffer protocol.
    #[pyclass(frozen)]
    struct Numbers(Vec<u32>);

    #[pymethods]
    impl Numbers {
        /// # Safety
        /// Called by Python with a view to fill. The view keeps this object alive, and nothing ever changes its numbers.
        unsafe fn __getbuffer__(this: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
            let numbers = &this.get().0;
            let (start, bytes) = (numbers.as_ptr() as *mut c_void, 4 * numbers.len() as ffi::Py_ssize_t);
            match ffi::PyBuffer_FillInfo(view, this.as_ptr(), start, bytes, 1, flags) {
                0 => Ok(()),
                _ => Err(PyErr::fetch(this.py())),
            }
        }
    }

    impl Encoder {
        fn list<'py>(&self, py: Python<'py>, ids: &[u32]) -> PyResult<Bound<'py, PyList>> {
            // an id to prepend may be none of a token: it gets a number of its own
            let number = |&id: &u32| self.ids.get(id as usize).map_or_else(|| PyInt::new(py, id), |number| number.bind(py).clone());
            PyList::new(py, ids.iter().map(number))
        }

        fn batch(&self, py: Python<'_>, texts: &[Bound<'_, PyString>], prepend: Option<u32>, threads: usize) -> PyResult<Vec<(Vec<u32>, Vec<usize>)>> {
            let contents = texts.iter().map(|text| text.to_str()).collect::<PyResult<Vec<&str>>>()?;
            py.detach(|| self.core.encode_batch(&contents, prepend, threads)).map_err(PyValueError::new_err)
        }
    }

    #[pymodule]
    fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("PATTERN", PATTERN)?;
        module.add_class::<Encoder>()?;
        module.add_function(wrap_pyfunction!(train, module)?)?;
        module.add_function(wrap_pyfunction!(count, module)?)?;
        module.add_function(wrap_pyfunction!(merge, module)?)?;
        module.add_function(wrap_pyfunction!(split, module)?)
    }
}
