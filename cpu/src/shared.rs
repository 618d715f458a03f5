//! Buffers that all workers of a step read and write.

use memmap2::MmapMut;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::cell::UnsafeCell;
use std::fmt;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::NonNull;

/// Buffers begin at a cache line, which is also what the widest vectors like best.
const ALIGN: usize = 64;
/// What the system's allocator gives zeroed without touching the memory.
const SYSTEM_ALIGN: usize = 16;
/// Buffers of this many bytes are mappings of their own, for which the system is asked to use huge pages: a pool is read
/// a few kilobytes here and there, and with small pages the translation of addresses costs more than the reads.
const MAPPED: usize = 4 << 20;
/// Memory is given back in pieces of this many bytes: a page of most systems. Where pages are larger, the system refuses.
const RELEASED: usize = 4 << 10;

mod sealed {
    /// Plain numbers: every bit pattern is a value, zero bytes among them.
    pub trait Plain: Copy + Send + Sync + 'static {}
    impl Plain for u8 {}
    impl Plain for i8 {}
    impl Plain for i16 {}
    impl Plain for i32 {}
    impl Plain for u32 {}
    impl Plain for f32 {}
}
pub(crate) use sealed::Plain;

/// The system has no memory for a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfMemory {
    /// Bytes of the buffer.
    pub bytes: usize,
}

/// Calls `f`, in which buffers may be made, and says if there was no memory for one of them.
///
/// Nearly everything here has buffers inside, and none of it could do more about their failure than to pass it on. So it unwinds, as a
/// panic does but without a word, up to here.
///
/// # Errors
/// [`OutOfMemory`] for the buffer that could not be had.
pub fn allocating<T>(f: impl FnOnce() -> T) -> Result<T, OutOfMemory> {
    catch_unwind(AssertUnwindSafe(f)).map_err(|e| match e.downcast() {
        Ok(out_of_memory) => *out_of_memory,
        Err(panic) => resume_unwind(panic),
    })
}

/// A fixed buffer that the workers of a step read and write in disjoint parts.
///
/// Outside of a step it is used through `&mut`, so the borrow checker knows that no step is running. Inside a step the
/// operations of [`Pass`](crate::Pass) take it by `&`; why that is sound is said there.
///
/// The memory is zero, and costs nothing until it is touched.
pub struct Shared<T: Plain> {
    /// Who owns the numbers.
    memory: Memory,
    /// The first cache line in it.
    data: NonNull<UnsafeCell<T>>,
    len: usize,
}

/// Zeroed memory.
enum Memory {
    /// From the allocator.
    Heap { base: NonNull<u8>, layout: Layout },
    /// A mapping of its own.
    Map { map: MmapMut },
}

impl Memory {
    /// `size` bytes, in a mapping of their own if they are `mapped` or more.
    fn zeroed(size: usize, mapped: usize) -> Self {
        if size >= mapped
            && !cfg!(miri)
            && let Ok(map) = MmapMut::map_anon(size)
        {
            // It works without as well.
            #[cfg(target_os = "linux")]
            if size >= MAPPED {
                let _ = map.advise(memmap2::Advice::HugePage);
            }
            return Self::Map { map };
        }
        let out_of_memory = || resume_unwind(Box::new(OutOfMemory { bytes: size }));
        let Ok(layout) = Layout::from_size_align(size, SYSTEM_ALIGN) else {
            out_of_memory()
        };
        // SAFETY: the size is not zero, because the caller adds a cache line.
        match NonNull::new(unsafe { alloc_zeroed(layout) }) {
            Some(base) => Self::Heap { base, layout },
            None => out_of_memory(),
        }
    }

    /// The first cache line. There is one more than what was asked for.
    fn first_line(&mut self) -> NonNull<u8> {
        let base = match self {
            Self::Heap { base, .. } => *base,
            Self::Map { map } => NonNull::new(map.as_mut_ptr()).expect("a mapping is somewhere"),
        };
        // SAFETY: the offset is less than a cache line.
        unsafe { base.add(base.align_offset(ALIGN).min(ALIGN)) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Self::Heap { base, layout } = *self {
            // SAFETY: allocated by `zeroed` with the same layout.
            unsafe { dealloc(base.as_ptr(), layout) }
        }
    }
}

// SAFETY: the buffer owns its memory, and plain numbers may go anywhere.
unsafe impl<T: Plain> Send for Shared<T> {}
// SAFETY: `&Shared` gives access to the numbers only through the unsafe functions below, whose callers keep to the
// rules of a step.
unsafe impl<T: Plain> Sync for Shared<T> {}

impl<T: Plain> Shared<T> {
    /// A buffer of `len` zeros; without memory for it, see [`allocating`].
    pub fn zeroed(len: usize) -> Self {
        Self::new(len, MAPPED)
    }

    /// A buffer of `len` zeros of which parts can be [released](Self::release).
    pub fn mapped(len: usize) -> Self {
        Self::new(len, 2 * RELEASED)
    }

    fn new(len: usize, mapped: usize) -> Self {
        let size = len
            .checked_mul(size_of::<T>())
            .and_then(|n| n.checked_add(ALIGN));
        let mut memory = Memory::zeroed(size.expect("a buffer fits the address space"), mapped);
        let data = memory.first_line().cast();
        Self { memory, data, len }
    }

    /// A buffer with these numbers.
    pub fn from_slice(values: &[T]) -> Self {
        let mut shared = Self::zeroed(values.len());
        shared.as_mut_slice().copy_from_slice(values);
        shared
    }

    /// How many numbers there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All numbers, outside of a step.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: `data` is aligned and valid for `len` initialized numbers, and `&mut self` says that nobody else is here.
        unsafe { std::slice::from_raw_parts_mut(self.as_ptr(), self.len) }
    }

    /// Gives the memory of some numbers back to the system, as far as that goes; what they are then is not said. Whatever lies behind
    /// them must have been given back before.
    pub fn release(&mut self, range: Range<usize>) {
        assert!(range.end <= self.len, "range within the buffer");
        #[cfg(unix)]
        if let Memory::Map { map } = &self.memory {
            use memmap2::UncheckedAdvice::DontNeed;
            let piece = |i: usize| (i * size_of::<T>()).next_multiple_of(RELEASED);
            let (start, end) = (piece(range.start), piece(range.end).min(map.len()));
            if start < end {
                // SAFETY: any bytes are numbers, and `&mut self` says that nobody reads them now. It may fail: they stay then.
                let _ = unsafe { map.unchecked_advise_range(DontNeed, start, end - start) };
            }
        }
    }

    /// Makes the buffer longer by zeros; what is in it stays.
    pub fn grow(&mut self, len: usize) {
        if len > self.len && !self.extend(len) {
            let mapped = match self.memory {
                Memory::Map { .. } => 0,
                Memory::Heap { .. } => MAPPED,
            };
            let mut longer = Self::new(len, mapped);
            longer.as_mut_slice()[..self.len].copy_from_slice(self.as_mut_slice());
            *self = longer;
        }
    }

    /// Makes a mapping longer without touching what is in it, where the system can.
    fn extend(&mut self, len: usize) -> bool {
        #[cfg(target_os = "linux")]
        if let Memory::Map { map } = &mut self.memory {
            let size = len
                .checked_mul(size_of::<T>())
                .and_then(|n| n.checked_add(ALIGN));
            let size = size.expect("a buffer fits the address space");
            let options = memmap2::RemapOptions::new().may_move(true);
            // SAFETY: the mapping is nobody else's, and `&mut self` says that there are no references into it.
            if unsafe { map.remap(size, options) }.is_ok() {
                self.data = self.memory.first_line().cast();
                self.len = len;
                return true;
            }
        }
        let _ = len;
        false
    }

    /// Whether both are the same buffer.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.data == other.data
    }

    pub(crate) fn as_ptr(&self) -> *mut T {
        UnsafeCell::raw_get(self.data.as_ptr())
    }

    /// Numbers that nobody writes now.
    ///
    /// # Safety
    /// No worker writes any of them before all have passed the next barrier, or the returned slice is gone before.
    pub(crate) unsafe fn slice(&self, range: Range<usize>) -> &[T] {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "range within the buffer"
        );
        // SAFETY: in bounds by the assertion; not written to by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.as_ptr().add(range.start), range.len()) }
    }

    /// Numbers that only the caller touches now.
    ///
    /// # Safety
    /// No other slice of any worker overlaps the returned one while it lives, barriers included.
    #[allow(clippy::mut_from_ref, reason = "this is what an UnsafeCell is for")]
    pub(crate) unsafe fn slice_mut(&self, range: Range<usize>) -> &mut [T] {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "range within the buffer"
        );
        // SAFETY: in bounds by the assertion; not touched by others by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.as_ptr().add(range.start), range.len()) }
    }
}

impl<T: Plain> fmt::Debug for Shared<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Shared({} x {})", self.len, std::any::type_name::<T>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_aligned_and_growable() {
        for len in [0, 1, 3, 1000, if cfg!(miri) { 2000 } else { 3 << 20 }] {
            let mut s = Shared::<f32>::zeroed(len);
            assert!(s.as_mut_slice().iter().all(|&x| x == 0.0));
            assert!(cfg!(miri) || (s.as_ptr() as usize).is_multiple_of(ALIGN));
            s.as_mut_slice().fill(1.0);
            let longer = 2 * len + 7;
            s.grow(longer);
            assert!(s.as_mut_slice()[..len].iter().all(|&x| x == 1.0));
            assert!(s.as_mut_slice()[len..].iter().all(|&x| x == 0.0));
            assert_eq!(s.len(), longer);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "what the system refuses")]
    fn a_buffer_that_cannot_be_had_is_an_error() {
        let bytes = isize::MAX as usize - 3;
        let e = allocating(|| Shared::<u8>::zeroed(bytes - ALIGN)).unwrap_err();
        assert_eq!(e, OutOfMemory { bytes });
        let mut s = Shared::<u8>::from_slice(&[1, 2]);
        assert!(allocating(|| s.grow(bytes - ALIGN)).is_err());
        assert_eq!(s.as_mut_slice(), [1, 2]);
        let other = std::panic::catch_unwind(|| allocating(|| resume_unwind(Box::new("other"))));
        assert!(other.unwrap_err().is::<&str>(), "a panic goes on");
    }

    #[test]
    fn what_is_released_may_be_written_again() {
        let n = 5 * RELEASED + 100;
        let mut s = Shared::<u8>::mapped(n);
        s.as_mut_slice().fill(1);
        s.release(n - 1..n);
        s.release(2 * RELEASED - 1..n - 1);
        assert!(s.as_mut_slice()[..2 * RELEASED - 1].iter().all(|&x| x == 1));
        let gone = s.as_mut_slice()[2 * RELEASED..].iter().all(|&x| x == 0);
        assert!(gone || cfg!(miri) || cfg!(not(unix)));
        s.as_mut_slice().fill(2);
        assert!(s.as_mut_slice().iter().all(|&x| x == 2));
    }

    #[test]
    fn workers_write_disjoint_parts() {
        let team = crate::Team::new(3);
        let mut s = Shared::<u32>::zeroed(100);
        team.run(|w| {
            let range = w.range(100, 1);
            // SAFETY: ranges of workers are disjoint, and the slice is gone at the barrier.
            unsafe { s.slice_mut(range.clone()) }.fill(1);
            w.barrier();
            // SAFETY: nobody writes any more.
            assert_eq!(unsafe { s.slice(0..100) }.iter().sum::<u32>(), 100);
        });
        assert_eq!(s.as_mut_slice().len(), 100);
    }
}
