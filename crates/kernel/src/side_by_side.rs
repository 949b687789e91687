//! Looking at many things on all processors: the order of the answers is that of the questions.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

/// Fewer things than this are not worth a thread.
const FEW: usize = 32;
/// Threads at most.
const MOST: usize = 4;
/// Things that a thread takes at once.
const PORTION: usize = 16;

/// What `ask` answers for each of `items`.
pub fn side_by_side<T: Sync, R: Send>(items: &[T], ask: impl Fn(&T) -> R + Sync) -> Vec<R> {
    if items.len() < FEW || processors() == 1 {
        return items.iter().map(ask).collect();
    }
    let next = AtomicUsize::new(0);
    let portions = || {
        let mut answers = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(portion) = items.chunks(PORTION).nth(at) else { return answers };
            answers.push((at, portion.iter().map(&ask).collect::<Vec<R>>()));
        }
    };
    let mut all = thread::scope(|scope| {
        let others: Vec<_> =
            (1..processors()).filter_map(|_| thread::Builder::new().spawn_scoped(scope, portions).ok()).collect();
        let mut all = portions();
        for other in others {
            all.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        all
    });
    all.sort_unstable_by_key(|(at, _)| *at);
    all.into_iter().flat_map(|(_, answers)| answers).collect()
}

/// What two questions answer, of which each takes long.
pub fn both<A: Send, B>(first: impl FnOnce() -> A + Send, second: impl FnOnce() -> B) -> (A, B) {
    if processors() == 1 {
        return (first(), second());
    }
    // Where there can be no thread, it is asked here.
    let first = Mutex::new(Some(first));
    let ask = || {
        let first = first.lock().unwrap_or_else(PoisonError::into_inner).take();
        first.map(|ask| ask())
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().spawn_scoped(scope, ask).ok();
        let second = second();
        let first = match thread {
            Some(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            None => ask(),
        };
        (first.expect("it is asked once"), second)
    })
}

/// How many threads are worth having. The standard library reads the limits of control groups for each answer.
pub fn processors() -> usize {
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    *PROCESSORS.get_or_init(|| thread::available_parallelism().map_or(1, usize::from).min(MOST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_of_two_questions_is_answered() {
        let words = ["one".to_owned(), "two".to_owned()];
        assert_eq!(both(|| words[0].len() + 4, || words.concat()), (7, "onetwo".to_owned()));
    }

    #[test]
    fn answers_come_in_the_order_of_the_questions() {
        for count in [0, 1, FEW - 1, FEW, 1000] {
            let items: Vec<usize> = (0..count).collect();
            assert_eq!(side_by_side(&items, |i| i * 2), (0..count).map(|i| i * 2).collect::<Vec<_>>());
        }
    }
}
