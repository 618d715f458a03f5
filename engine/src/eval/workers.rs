//! Many jobs side by side, one a core.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

/// How often the caller is asked whether to go on.
const TICK: Duration = Duration::from_millis(100);

/// Runs `work` over `jobs` on `n` threads, in the order of the list, and hands each result to `done` on this thread as it comes.
///
/// `work` is told whether to stop by its second argument. `done` is also called with `None` some times a second. When it breaks, no job
/// begins any more, and those that run are told to stop.
pub fn run<J: Sync, R: Send>(
    n: usize,
    jobs: &[J],
    work: impl Fn(&J, &dyn Fn() -> bool) -> R + Sync,
    mut done: impl FnMut(Option<(&J, R)>) -> ControlFlow<()>,
) {
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let (send, receive) = channel();
    std::thread::scope(|scope| {
        for ith in 0..n.clamp(1, jobs.len().max(1)) {
            let (send, next, stop, work) = (send.clone(), &next, &stop, &work);
            let worker = move || {
                let stopped = || stop.load(Ordering::Relaxed);
                while !stopped() {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(job) = jobs.get(i) else { break };
                    let result = work(job, &stopped);
                    if send.send((i, result)).is_err() {
                        break;
                    }
                }
            };
            match std::thread::Builder::new().spawn_scoped(scope, worker) {
                // One does all that others would have done.
                Err(_) if ith > 0 => break,
                started => started.expect("a worker can be started"),
            };
        }
        drop(send);
        loop {
            let flow = match receive.recv_timeout(TICK) {
                Ok((i, result)) => done(Some((&jobs[i], result))),
                Err(RecvTimeoutError::Timeout) => done(None),
                Err(RecvTimeoutError::Disconnected) => break,
            };
            if flow.is_break() {
                stop.store(true, Ordering::Relaxed);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_job_once() {
        let jobs: Vec<u32> = (0..100).collect();
        let mut got = Vec::new();
        run(
            3,
            &jobs,
            |j, _| j * 2,
            |r| {
                if let Some((j, r)) = r {
                    assert_eq!(r, j * 2);
                    got.push(*j);
                }
                ControlFlow::Continue(())
            },
        );
        got.sort_unstable();
        assert_eq!(got, jobs);
    }

    #[test]
    fn stops_when_told() {
        let jobs = vec![(); 1000];
        let mut n = 0;
        run(
            2,
            &jobs,
            |(), _| std::thread::sleep(Duration::from_millis(1)),
            |r| {
                n += usize::from(r.is_some());
                if n >= 10 {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            },
        );
        assert!((10..900).contains(&n), "{n}");
    }
}
