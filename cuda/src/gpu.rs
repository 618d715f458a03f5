//! A device as the rest of the crate sees it: buffers, launches and recorded graphs, on the driver or on the emulator.
//!
//! There is one stream, so whatever is asked for happens in that order. Uploads and downloads go through [`Pinned`] memory, which
//! waits before it is touched by the host while a copy may still be using it.

use std::fmt;
use std::sync::Arc;

use crate::args::Args;
use crate::devices::DeviceInfo;

/// What a device had to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaError(pub String);

impl fmt::Display for CudaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for CudaError {}

pub(crate) type Result<T> = std::result::Result<T, CudaError>;

/// Geometry of a launch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Launch {
    pub(crate) grid: [u32; 3],
    pub(crate) block: u32,
    /// Bytes of dynamic shared memory.
    pub(crate) shared: u32,
    /// The blocks wait for each other: all are resident at once, or the launch is refused.
    pub(crate) together: bool,
}

/// A recorded sequence of launches.
pub(crate) trait GraphExec: Send {
    fn replay(&self) -> Result<()>;
}

/// What a driver does. Addresses are device addresses; copies and launches are in stream order.
pub(crate) trait Device: Send + Sync {
    fn info(&self) -> &DeviceInfo;
    /// Makes the device that of the calling thread.
    fn bind(&self) -> Result<()>;
    /// Zeroed memory, aligned to 256 bytes.
    fn alloc(&self, bytes: usize) -> Result<u64>;
    /// # Safety
    /// `at` came from `alloc` and is not used again.
    unsafe fn free(&self, at: u64, bytes: usize);
    /// Bytes that [`Device::back`] takes, or multiples of them; 0 if the device cannot.
    fn grain(&self) -> usize;
    /// Addresses without memory.
    fn reserve(&self, bytes: usize) -> Result<u64>;
    /// # Safety
    /// `at` came from `reserve`, has no memory, and is not used again.
    unsafe fn unreserve(&self, at: u64, bytes: usize);
    /// Zeroed memory at an address, and its name.
    ///
    /// # Safety
    /// Inside a reserved range, at a multiple of [`Device::grain`] from its beginning, where there is none yet.
    unsafe fn back(&self, at: u64, bytes: usize) -> Result<u64>;
    /// # Safety
    /// As `back` has made it; nothing uses it any more.
    unsafe fn unback(&self, at: u64, bytes: usize, name: u64);
    /// # Safety
    /// Both lie inside live buffers.
    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()>;
    /// Page-locked host memory, or null.
    fn alloc_host(&self, bytes: usize) -> Result<*mut u8>;
    /// # Safety
    /// `at` came from `alloc_host` and is not used again.
    unsafe fn free_host(&self, at: *mut u8, bytes: usize);
    /// # Safety
    /// `from` is page-locked memory that is left alone until the copy is done; `to` lies inside a live buffer.
    unsafe fn upload(&self, to: u64, from: *const u8, bytes: usize) -> Result<()>;
    /// # Safety
    /// As [`Device::upload`].
    unsafe fn download(&self, to: *mut u8, from: u64, bytes: usize) -> Result<()>;
    /// # Safety
    /// `args` are those of the kernel, and what they point to is alive and large enough.
    unsafe fn launch(&self, kernel: &'static str, launch: Launch, args: &[u8]) -> Result<()>;
    /// Waits for everything that was asked for.
    fn synchronize(&self) -> Result<()>;
    /// Something that can stand between launches.
    fn alloc_mark(&self) -> Result<usize>;
    /// # Safety
    /// `mark` came from `alloc_mark` and is not used again.
    unsafe fn free_mark(&self, mark: usize);
    /// # Safety
    /// `mark` came from `alloc_mark`.
    unsafe fn set_mark(&self, mark: usize) -> Result<()>;
    /// Waits for everything that was asked for before the mark was last set.
    ///
    /// # Safety
    /// `mark` came from `alloc_mark`.
    unsafe fn wait_mark(&self, mark: usize) -> Result<()>;
    fn begin_capture(&self) -> Result<()>;
    fn end_capture(&self) -> Result<Box<dyn GraphExec>>;
    /// Free and total bytes of device memory.
    fn memory(&self) -> Result<(usize, usize)>;
}

/// A device that is ready for work. Cheap to clone.
#[derive(Clone)]
pub struct Gpu {
    pub(crate) device: Arc<dyn Device>,
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Gpu").field(self.device.info()).finish()
    }
}

impl Gpu {
    /// Opens the device of this place in the list of [`crate::devices`].
    ///
    /// # Errors
    /// Why it cannot be used.
    #[cfg(feature = "cuda")]
    pub fn open(ordinal: u32) -> Result<Self> {
        Ok(Self {
            device: Arc::new(crate::driver::Driver::open(ordinal)?),
        })
    }

    /// Opens the device of this place in the list of [`crate::devices`].
    ///
    /// # Errors
    /// Always: this program was built without the driver.
    #[cfg(not(feature = "cuda"))]
    pub fn open(_: u32) -> Result<Self> {
        Err(CudaError(
            "this program was built without CUDA (cargo feature `cuda`)".to_owned(),
        ))
    }

    /// The kernels as C++ on the CPU. Threads of a block take turns in ascending order, or descending, which shows missing barriers.
    #[cfg(feature = "emulate")]
    pub fn emulated(descending: bool) -> Self {
        Self {
            device: Arc::new(crate::emulator::Emulator::new(descending)),
        }
    }

    /// What the device is.
    pub fn info(&self) -> &DeviceInfo {
        self.device.info()
    }

    /// Makes the device that of the calling thread; needed before anything else when a [`Gpu`] comes from another thread.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn bind(&self) -> Result<()> {
        self.device.bind()
    }

    /// Whether kernels run on the CPU, with no memory but the host's.
    pub fn is_emulated(&self) -> bool {
        self.info().name == "emulator"
    }

    /// Whether four warps multiply together, straight from shared memory: on compute capability 9.0, where kernels were compiled for that.
    pub(crate) fn has_group_products(&self) -> bool {
        self.info().sm == (9, 0) && (cfg!(group_products) || self.is_emulated())
    }

    /// Free and total bytes of device memory.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.device.memory()
    }

    /// A buffer of zeros.
    ///
    /// # Errors
    /// When the device has no room, saying how much is free.
    pub fn alloc(&self, bytes: usize) -> Result<Buffer> {
        let at = self.device.alloc(bytes.max(16))?;
        Ok(Buffer {
            gpu: self.clone(),
            view: View { at, bytes },
        })
    }

    /// Whether a [`Stretch`](crate::Stretch) can have less memory than addresses.
    pub fn can_stretch(&self) -> bool {
        self.device.grain() > 0
    }

    /// Page-locked host memory of zeros.
    ///
    /// # Errors
    /// When there is none.
    pub fn pinned(&self, bytes: usize) -> Result<Pinned> {
        let at = self.device.alloc_host(bytes.max(16))?;
        // SAFETY: `at` is valid for that many bytes and nobody else has it.
        unsafe { at.write_bytes(0, bytes.max(16)) };
        Ok(Pinned {
            gpu: self.clone(),
            at,
            bytes,
            busy: false,
        })
    }

    /// A mark that has not been set.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn mark(&self) -> Result<Mark> {
        Ok(Mark {
            mark: self.device.alloc_mark()?,
            gpu: self.clone(),
        })
    }

    /// A buffer with these contents.
    ///
    /// # Errors
    /// As [`Gpu::alloc`].
    pub fn buffer_of(&self, data: &[u8]) -> Result<Buffer> {
        let buffer = self.alloc(data.len())?;
        let mut pinned = self.pinned(data.len())?;
        pinned.bytes_mut()?.copy_from_slice(data);
        pinned.upload(0, buffer.view())?;
        self.synchronize()?;
        Ok(buffer)
    }

    /// Copies inside device memory.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn copy(&self, to: View, from: View) -> Result<()> {
        assert_eq!(to.bytes, from.bytes);
        // SAFETY: views lie inside buffers.
        unsafe { self.device.copy(to.at, from.at, to.bytes) }
    }

    /// The bytes of a view, waiting for whatever writes them.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn read(&self, from: View) -> Result<Vec<u8>> {
        let mut pinned = self.pinned(from.bytes)?;
        pinned.download(0, from)?;
        Ok(pinned.bytes()?.to_vec())
    }

    /// Waits until everything asked for is done.
    ///
    /// # Errors
    /// What went wrong in the meantime.
    pub fn synchronize(&self) -> Result<()> {
        self.device.synchronize()
    }

    /// Records what `work` launches instead of running it.
    ///
    /// # Errors
    /// Those of `work` and of the driver.
    pub fn record(&self, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        self.device.begin_capture()?;
        let done = work();
        let exec = self.device.end_capture();
        done?;
        Ok(Graph {
            exec: exec?,
            _gpu: self.clone(),
        })
    }

    pub(crate) fn launch<A: Args>(&self, launch: Launch, args: &A) -> Result<()> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        let [_, y, z] = launch.grid;
        if y > 65535 || z > 65535 {
            return Err(CudaError(format!(
                "{}: a grid of {:?} is beyond the limits of CUDA",
                A::KERNEL,
                launch.grid
            )));
        }
        // SAFETY: `Args` are plain bytes without padding, declared as in the kernel; `ops` checked the views behind the addresses.
        unsafe {
            let bytes =
                std::slice::from_raw_parts(std::ptr::from_ref(args).cast::<u8>(), size_of::<A>());
            self.device.launch(A::KERNEL, launch, bytes)
        }
    }
}

/// Device memory.
///
/// Views of it must not be used when it is gone; whoever makes views keeps the buffer beside them.
#[derive(Debug)]
pub struct Buffer {
    gpu: Gpu,
    view: View,
}

impl Buffer {
    /// All of it.
    pub fn view(&self) -> View {
        self.view
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // Launches that use the buffer may still be under way.
        let _ = self.gpu.bind();
        let _ = self.gpu.synchronize();
        // SAFETY: from `alloc`, and this is its owner.
        unsafe { self.gpu.device.free(self.view.at, self.view.bytes.max(16)) };
    }
}

/// A part of a [`Buffer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    pub(crate) at: u64,
    pub(crate) bytes: usize,
}

impl View {
    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// A part of it. Panics if it reaches beyond the end.
    #[must_use]
    pub fn slice(&self, from: usize, bytes: usize) -> Self {
        assert!(
            from.checked_add(bytes).is_some_and(|end| end <= self.bytes),
            "{from} + {bytes} of {}",
            self.bytes
        );
        Self {
            at: self.at + from as u64,
            bytes,
        }
    }
}

/// Page-locked host memory.
pub struct Pinned {
    gpu: Gpu,
    at: *mut u8,
    bytes: usize,
    /// A copy may be under way.
    busy: bool,
}

// SAFETY: the memory belongs to this value alone, and the device may be used from any thread.
unsafe impl Send for Pinned {}
// SAFETY: shared access only reads, and only when no copy is under way.
unsafe impl Sync for Pinned {}

impl Pinned {
    fn wait(&mut self) -> Result<()> {
        if self.busy {
            self.gpu.synchronize()?;
            self.busy = false;
        }
        Ok(())
    }

    /// Its contents, once copies are done.
    ///
    /// # Errors
    /// What went wrong on the device in the meantime.
    pub fn bytes(&mut self) -> Result<&[u8]> {
        self.wait()?;
        Ok(self.settled())
    }

    /// Its contents if no copy is under way, nothing otherwise.
    pub fn settled(&self) -> &[u8] {
        let n = if self.busy { 0 } else { self.bytes };
        // SAFETY: ours, initialised, and no copy is under way.
        unsafe { std::slice::from_raw_parts(self.at, n) }
    }

    /// Where kernels find it: they read and write it through the bus. The caller sees to it that they are done ([`Mark`]) before the
    /// host looks.
    pub fn view(&self) -> View {
        View {
            at: self.at as u64,
            bytes: self.bytes,
        }
    }

    /// Its word `i`, which a kernel may be about to write. Panics beyond the end.
    pub fn word(&self, i: usize) -> u32 {
        assert!(4 * i + 4 <= self.bytes);
        // SAFETY: inside, aligned; a word is written at once.
        unsafe { self.at.cast::<u32>().add(i).read_volatile() }
    }

    /// Its contents as numbers if no copy is under way.
    pub fn settled_f32(&self) -> &[f32] {
        let bytes = self.settled();
        // SAFETY: page-locked memory is aligned to a page; any bytes are valid floats.
        unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len() / 4) }
    }

    /// Its contents to be written, once copies are done.
    ///
    /// # Errors
    /// What went wrong on the device in the meantime.
    pub fn bytes_mut(&mut self) -> Result<&mut [u8]> {
        self.wait()?;
        // SAFETY: as in `settled`, and borrowed mutably.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.at, self.bytes) })
    }

    /// Copies bytes from `from` on to the device, as many as `to` holds.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn upload(&mut self, from: usize, to: View) -> Result<()> {
        assert!(from + to.bytes <= self.bytes);
        self.busy = true;
        // SAFETY: inside this memory, which is not touched until `wait`.
        unsafe { self.gpu.device.upload(to.at, self.at.add(from), to.bytes) }
    }

    /// Copies a view from the device to `to` on.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn download(&mut self, to: usize, from: View) -> Result<()> {
        assert!(to + from.bytes <= self.bytes);
        self.busy = true;
        // SAFETY: inside this memory, which is not touched until `wait`.
        unsafe {
            self.gpu
                .device
                .download(self.at.add(to), from.at, from.bytes)
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = self.gpu.bind();
        let _ = self.wait();
        // SAFETY: from `alloc_host`, and this is its owner.
        unsafe { self.gpu.device.free_host(self.at, self.bytes.max(16)) };
    }
}

/// A place between launches that can be waited for.
#[derive(Debug)]
pub struct Mark {
    gpu: Gpu,
    mark: usize,
}

impl Mark {
    /// Puts it behind everything asked for so far.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn set(&self) -> Result<()> {
        // SAFETY: ours.
        unsafe { self.gpu.device.set_mark(self.mark) }
    }

    /// Waits for what was asked for before it was set.
    ///
    /// # Errors
    /// What went wrong on the device in the meantime.
    pub fn wait(&self) -> Result<()> {
        // SAFETY: ours.
        unsafe { self.gpu.device.wait_mark(self.mark) }
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        let _ = self.gpu.bind();
        // SAFETY: from `alloc_mark`, and this is its owner.
        unsafe { self.gpu.device.free_mark(self.mark) };
    }
}

/// A recorded sequence of launches. What they point to must outlive it.
pub struct Graph {
    exec: Box<dyn GraphExec>,
    _gpu: Gpu,
}

impl Graph {
    /// Asks for all of it once more.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn replay(&self) -> Result<()> {
        self.exec.replay()
    }
}
