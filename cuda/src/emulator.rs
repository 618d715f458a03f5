//! The kernels as C++ on the CPU, behind the same interface as the driver.
//!
//! "Device memory" is host memory whose end lies close to a page that cannot be touched, so that most reads and writes beyond a buffer
//! end the program. A recorded graph is a list of launches.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::sync::{Arc, Mutex};

use crate::devices::DeviceInfo;
use crate::gpu::{CudaError, Device, GraphExec, Launch, Result};

unsafe extern "C" {
    fn lemma_emulate(
        name: *const c_char,
        grid: *const c_uint,
        block: c_uint,
        shared: c_uint,
        args: *const c_void,
        args_bytes: usize,
        descending: c_int,
        together: c_int,
    ) -> c_int;
}

#[derive(Clone)]
struct Call {
    kernel: &'static str,
    launch: Launch,
    args: Vec<u8>,
}

/// The emulated device.
pub(crate) struct Emulator {
    info: DeviceInfo,
    descending: bool,
    /// The graph being recorded.
    recording: Mutex<Option<Vec<Call>>>,
}

impl Emulator {
    pub(crate) fn new(descending: bool) -> Self {
        let info = DeviceInfo {
            ordinal: 0,
            name: "emulator".to_owned(),
            // Both kinds of kernels have their turn.
            sm: if descending { (9, 0) } else { (8, 0) },
            n_sm: 4,
            memory: 1 << 34,
            driver: (0, 0),
        };
        Self {
            info,
            descending,
            recording: Mutex::new(None),
        }
    }

    fn recording(&self) -> std::sync::MutexGuard<'_, Option<Vec<Call>>> {
        self.recording
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn run(call: &Call, descending: bool) -> Result<()> {
    let name = CString::new(call.kernel).expect("names have no zeros");
    // SAFETY: the grid has three numbers and the arguments their size; what they point to is the promise of `Device::launch`.
    let answer = unsafe {
        lemma_emulate(
            name.as_ptr(),
            call.launch.grid.as_ptr(),
            call.launch.block,
            call.launch.shared,
            call.args.as_ptr().cast(),
            call.args.len(),
            c_int::from(descending),
            c_int::from(call.launch.together),
        )
    };
    match answer {
        0 => Ok(()),
        1 => Err(CudaError(format!("{}: no such kernel", call.kernel))),
        2 => Err(CudaError(format!(
            "{}: arguments of {} bytes do not fit",
            call.kernel,
            call.args.len()
        ))),
        4 => Err(CudaError(format!(
            "{}: a write behind {} bytes of shared memory",
            call.kernel, call.launch.shared
        ))),
        _ => Err(CudaError(format!(
            "{}: no GPU accepts {:?}",
            call.kernel, call.launch
        ))),
    }
}

/// Guarded memory: the layout that a buffer of this size has.
fn layout(bytes: usize) -> std::alloc::Layout {
    std::alloc::Layout::from_size_align(bytes, 4096).expect("a size that fits")
}

impl Device for Emulator {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn bind(&self) -> Result<()> {
        Ok(())
    }

    fn alloc(&self, bytes: usize) -> Result<u64> {
        guard::alloc(bytes).map(|p| p as u64)
    }

    unsafe fn free(&self, at: u64, bytes: usize) {
        // SAFETY: the caller's promise.
        unsafe { guard::free(at as *mut u8, bytes) };
    }

    fn grain(&self) -> usize {
        guard::PAGE
    }

    fn reserve(&self, bytes: usize) -> Result<u64> {
        guard::reserve(bytes).map(|p| p as u64)
    }

    unsafe fn unreserve(&self, at: u64, bytes: usize) {
        // SAFETY: the caller's promise.
        unsafe { guard::unreserve(at as *mut u8, bytes) };
    }

    unsafe fn back(&self, at: u64, bytes: usize) -> Result<u64> {
        // SAFETY: the caller's promise.
        unsafe { guard::open(at as *mut u8, bytes) }.map(|()| 0)
    }

    unsafe fn unback(&self, at: u64, bytes: usize, _: u64) {
        // SAFETY: the caller's promise.
        unsafe { guard::close(at as *mut u8, bytes) };
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }

    fn alloc_host(&self, bytes: usize) -> Result<*mut u8> {
        // SAFETY: the size is not zero.
        Ok(unsafe { std::alloc::alloc_zeroed(layout(bytes)) })
    }

    unsafe fn free_host(&self, at: *mut u8, bytes: usize) {
        // SAFETY: the caller's promise.
        unsafe { std::alloc::dealloc(at, layout(bytes)) };
    }

    unsafe fn upload(&self, to: u64, from: *const u8, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(from, to as *mut u8, bytes) };
        Ok(())
    }

    unsafe fn download(&self, to: *mut u8, from: u64, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to, bytes) };
        Ok(())
    }

    unsafe fn launch(&self, kernel: &'static str, launch: Launch, args: &[u8]) -> Result<()> {
        let call = Call {
            kernel,
            launch,
            args: args.to_vec(),
        };
        if let Some(calls) = self.recording().as_mut() {
            calls.push(call);
            return Ok(());
        }
        run(&call, self.descending)
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn alloc_mark(&self) -> Result<usize> {
        Ok(0)
    }

    unsafe fn free_mark(&self, _: usize) {}

    unsafe fn set_mark(&self, _: usize) -> Result<()> {
        Ok(())
    }

    unsafe fn wait_mark(&self, _: usize) -> Result<()> {
        Ok(())
    }

    fn begin_capture(&self) -> Result<()> {
        *self.recording() = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&self) -> Result<Box<dyn GraphExec>> {
        let calls = self.recording().take().unwrap_or_default();
        Ok(Box::new(Recorded {
            calls: Arc::new(calls),
            descending: self.descending,
        }))
    }

    fn memory(&self) -> Result<(usize, usize)> {
        Ok((1 << 34, 1 << 34))
    }
}

struct Recorded {
    calls: Arc<Vec<Call>>,
    descending: bool,
}

impl GraphExec for Recorded {
    fn replay(&self) -> Result<()> {
        self.calls.iter().try_for_each(|c| run(c, self.descending))
    }
}

/// Memory that ends, up to its alignment, at a page that cannot be touched.
mod guard {
    use std::ffi::{c_int, c_void};

    use crate::gpu::{CudaError, Result};

    pub(super) const PAGE: usize = 4096;
    const ALIGN: usize = 256;

    unsafe extern "C" {
        fn mmap(
            at: *mut c_void,
            n: usize,
            prot: c_int,
            flags: c_int,
            fd: c_int,
            offset: i64,
        ) -> *mut c_void;
        fn mprotect(at: *mut c_void, n: usize, prot: c_int) -> c_int;
        fn munmap(at: *mut c_void, n: usize) -> c_int;
        fn madvise(at: *mut c_void, n: usize, advice: c_int) -> c_int;
    }

    /// Mapped bytes without the guard, and where the buffer begins in them.
    fn place(bytes: usize) -> (usize, usize) {
        let mapped = bytes.next_multiple_of(PAGE);
        (mapped, mapped - bytes.next_multiple_of(ALIGN))
    }

    pub(super) fn alloc(bytes: usize) -> Result<*mut u8> {
        let (mapped, at) = place(bytes);
        // SAFETY: a fresh private mapping (PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS) whose last page is then locked.
        unsafe {
            let base = mmap(std::ptr::null_mut(), mapped + PAGE, 3, 0x22, -1, 0);
            if base as isize == -1 || mprotect(base.cast::<u8>().add(mapped).cast(), PAGE, 0) != 0 {
                return Err(CudaError(format!("{bytes} bytes of emulated memory")));
            }
            Ok(base.cast::<u8>().add(at))
        }
    }

    /// Addresses that cannot be touched.
    pub(super) fn reserve(bytes: usize) -> Result<*mut u8> {
        // SAFETY: a fresh private mapping (PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS).
        let base = unsafe { mmap(std::ptr::null_mut(), bytes, 0, 0x22, -1, 0) };
        if base as isize == -1 {
            return Err(CudaError(format!("{bytes} emulated addresses")));
        }
        Ok(base.cast())
    }

    /// # Safety
    /// From `reserve` with the same size.
    pub(super) unsafe fn unreserve(p: *mut u8, bytes: usize) {
        // SAFETY: the mapping that `reserve` made.
        unsafe { munmap(p.cast(), bytes) };
    }

    /// Makes whole pages of what was reserved memory of zeros.
    ///
    /// # Safety
    /// They are closed.
    pub(super) unsafe fn open(p: *mut u8, bytes: usize) -> Result<()> {
        // SAFETY: inside a mapping of ours (PROT_READ | PROT_WRITE).
        if unsafe { mprotect(p.cast(), bytes, 3) } != 0 {
            return Err(CudaError(format!("{bytes} bytes of emulated memory")));
        }
        Ok(())
    }

    /// Makes them addresses again.
    ///
    /// # Safety
    /// They are open, and nobody uses them.
    pub(super) unsafe fn close(p: *mut u8, bytes: usize) {
        // SAFETY: inside a mapping of ours; MADV_DONTNEED gives the memory back.
        unsafe {
            madvise(p.cast(), bytes, 4);
            mprotect(p.cast(), bytes, 0);
        }
    }

    /// # Safety
    /// From `alloc` with the same size.
    pub(super) unsafe fn free(p: *mut u8, bytes: usize) {
        let (mapped, at) = place(bytes);
        // SAFETY: the mapping that `alloc` made.
        unsafe { munmap(p.sub(at).cast(), mapped + PAGE) };
    }
}
