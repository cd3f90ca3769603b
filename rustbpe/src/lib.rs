//! Byte pair encoding for nanochat. `lib.rs` is what Python sees; the three steps are in the modules.

pub mod count;
pub mod merge;
pub mod split;

#[cfg(feature = "python")]
mod python {
    use crate::count::{Batch, Counts};
    use crate::merge::{Pair, Trainer};
    use crate::split::{Splitter, PATTERN};
    use pyo3::exceptions::PyValueError;
    use pyo3::prelude::*;
    use pyo3::types::{PyBytes, PyDict, PyString};
    use std::sync::mpsc::{sync_channel, Receiver};
    use std::sync::{Arc, Mutex};
    use std::thread;

    const BATCH_BYTES: usize = 1 << 22;

    /// Text is copied out of Python in batches of 4 MB while the other threads count: the queue holds at
    /// most one batch a thread, so memory is bounded by the distinct chunks, not by the corpus.
    fn count_chunks(texts: &Bound<'_, PyAny>, pattern: Option<&str>) -> PyResult<Counts> {
        let splitter = Splitter::new(pattern).map_err(PyValueError::new_err)?;
        let threads = thread::available_parallelism().map_or(1, |n| n.get());
        let (sender, receiver) = sync_channel::<Batch>(threads);
        let receiver = Arc::new(Mutex::new(receiver));
        thread::scope(|scope| {
            let spawn = |queue: Arc<Mutex<Receiver<Batch>>>| scope.spawn(|| count_batches(queue, &splitter));
            let workers: Vec<_> = (0..threads).map(|_| spawn(receiver.clone())).collect();
            drop(receiver); // the workers own the queue: without them, sending fails instead of waiting for ever
            let fed = feed(texts, |batch| sender.send(batch).is_ok());
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
            let Ok(mut batch) = received else { break };
            if failure.is_none() {
                failure = counts.add_batch(&mut batch, &splitter).err(); // go on emptying the queue
            }
        }
        failure.map_or(Ok(counts), Err)
    }

    /// Pulls strings from a Python iterator and hands them on in batches; stops at Ctrl-C.
    fn feed(texts: &Bound<'_, PyAny>, send: impl Fn(Batch) -> bool + Sync + Send) -> PyResult<()> {
        let py = texts.py();
        let mut batch = Batch::default();
        for text in texts.try_iter()? {
            let text = text?;
            let text = text.cast::<PyString>().map_err(|_| {
                let kind = text.get_type().name().map_or("?".into(), |name| name.to_string());
                PyValueError::new_err(format!("texts must be strings, found {kind}"))
            })?;
            batch.push(&text.to_string_lossy());
            if batch.bytes() >= BATCH_BYTES {
                let full = std::mem::take(&mut batch);
                if !py.detach(|| send(full)) {
                    break;
                }
                py.check_signals()?;
            }
        }
        if !batch.is_empty() {
            py.detach(|| send(batch));
        }
        Ok(())
    }

    fn learn_merges(py: Python<'_>, counts: Counts, num_merges: usize) -> PyResult<Vec<Pair>> {
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
            if !more {
                break;
            }
        }
        py.detach(|| drop(trainer));
        Ok(merges)
    }

    /// Learn vocab_size - 256 merges from an iterable of strings. Returns a list of (left id, right id):
    /// ids 0 to 255 are the bytes, merge number i makes id 256 + i. The list is shorter when the text has
    /// no pair left to merge.
    #[pyfunction]
    #[pyo3(signature = (texts, vocab_size, pattern=None))]
    fn train(texts: &Bound<'_, PyAny>, vocab_size: usize, pattern: Option<&str>) -> PyResult<Vec<Pair>> {
        let num_merges = vocab_size.checked_sub(256).ok_or_else(|| PyValueError::new_err("vocab_size must be at least 256, one id for each byte"))?;
        let counts = count_chunks(texts, pattern)?;
        learn_merges(texts.py(), counts, num_merges)
    }

    /// The first half of train: how often each distinct chunk occurs, as a dict from bytes to int.
    #[pyfunction]
    #[pyo3(signature = (texts, pattern=None))]
    fn count<'py>(texts: &Bound<'py, PyAny>, pattern: Option<&str>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(texts.py());
        let mut result = Ok(());
        count_chunks(texts, pattern)?.for_each(|chunk, count| {
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
        learn_merges(counts.py(), total, num_merges)
    }

    /// The chunks of one text.
    #[pyfunction]
    #[pyo3(signature = (text, pattern=None))]
    fn split<'py>(text: &Bound<'py, PyString>, pattern: Option<&str>) -> PyResult<Vec<Bound<'py, PyString>>> {
        let splitter = Splitter::new(pattern).map_err(PyValueError::new_err)?;
        let py_text = text.to_string_lossy();
        let mut chunks = vec![];
        let done = splitter.for_each(&py_text, |start, end| chunks.push(PyString::new(text.py(), &py_text[start..end])));
        done.map(|()| chunks).map_err(PyValueError::new_err)
    }

    #[pymodule]
    fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("PATTERN", PATTERN)?;
        module.add_function(wrap_pyfunction!(train, module)?)?;
        module.add_function(wrap_pyfunction!(count, module)?)?;
        module.add_function(wrap_pyfunction!(merge, module)?)?;
        module.add_function(wrap_pyfunction!(split, module)?)
    }
}
