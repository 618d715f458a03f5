//! The CUDA driver through cudarc's bindings, loaded when first needed.
//!
//! cudarc panics when a function is called without the library, so everything here begins with [`init`].

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Mutex, OnceLock};

use cudarc::driver::{DriverError, result, sys};

use crate::devices::DeviceInfo;
use crate::gpu::{CudaError, Device, GraphExec, Launch, Result};

/// Machine code of the kernels for several cards, and PTX for newer ones.
static FATBIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/lemma.fatbin"));

/// Names of the entry points in the fatbin.
const KERNELS: &[&str] = crate::args::KERNELS;

/// The largest dynamic shared memory that a launch may take without asking first.
const PLAIN_SHARED: u32 = 48 << 10;

fn error(what: &str, e: DriverError) -> CudaError {
    let text = e
        .error_string()
        .ok()
        .and_then(|s| s.to_str().ok())
        .unwrap_or("unknown error");
    CudaError(format!("{what}: {text}"))
}

/// Loads and starts the driver once. Its answer is kept.
fn init() -> std::result::Result<(), String> {
    static DONE: OnceLock<std::result::Result<(), String>> = OnceLock::new();
    DONE.get_or_init(|| {
        // SAFETY: opens the library and closes it again.
        if !unsafe { sys::is_culib_present() } {
            return Err("no CUDA driver was found".to_owned());
        }
        // A driver that is older than a function we need must not be met in the middle of a step.
        let version = driver_version();
        if version < 12000 {
            return Err(format!(
                "the CUDA driver supports CUDA {}.{}, and 12.0 is needed",
                version / 1000,
                version % 1000 / 10
            ));
        }
        result::init().map_err(|e| error("the CUDA driver does not start", e).0)
    })
    .clone()
}

fn driver_version() -> i32 {
    let mut version = 0;
    // SAFETY: the library is present; this function may be called before `cuInit`.
    let answer = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    if answer == sys::CUresult::CUDA_SUCCESS {
        version
    } else {
        0
    }
}

/// The devices there are; the error is why there are none.
pub(crate) fn probe() -> std::result::Result<Vec<DeviceInfo>, String> {
    init()?;
    let n = result::device::get_count().map_err(|e| error("CUDA devices", e).0)?;
    (0..n)
        .map(|i| info(i).map_err(|e| error("CUDA device", e).0))
        .collect()
}

fn info(ordinal: i32) -> std::result::Result<DeviceInfo, DriverError> {
    use sys::CUdevice_attribute as A;
    let device = result::device::get(ordinal)?;
    // SAFETY: the device is valid.
    let get = |a| unsafe { result::device::get_attribute(device, a) }.map(|v| v as u32);
    let version = driver_version() as u32;
    Ok(DeviceInfo {
        ordinal: ordinal as u32,
        name: result::device::get_name(device)?,
        sm: (
            get(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            get(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        n_sm: get(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        // SAFETY: the device is valid.
        memory: unsafe { result::device::total_mem(device) }? as u64,
        driver: (version / 1000, version % 1000 / 10),
    })
}

/// An open device: its primary context, one stream, the kernels.
pub(crate) struct Driver {
    info: DeviceInfo,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    module: sys::CUmodule,
    kernels: HashMap<&'static str, sys::CUfunction>,
    /// Whether a kernel may become resident while the one before it ends (programmatic dependent launch).
    overlap: bool,
    /// Bytes that memory comes in where addresses are reserved before; 0 if the device cannot do that.
    grain: usize,
    /// Kernels that have been allowed more than [`PLAIN_SHARED`], and how much.
    large: Mutex<HashMap<&'static str, u32>>,
}

// SAFETY: handles of the driver may be used from any thread that has made the context current (`bind`).
unsafe impl Send for Driver {}
// SAFETY: as above; the driver's functions are thread-safe.
unsafe impl Sync for Driver {}

impl Driver {
    pub(crate) fn open(ordinal: u32) -> Result<Self> {
        let all = probe().map_err(CudaError)?;
        let n = all.len();
        let Some(info) = all.into_iter().nth(ordinal as usize) else {
            return Err(CudaError(format!(
                "device CUDA{ordinal} does not exist: the driver finds {n}"
            )));
        };
        if info.sm < (8, 0) {
            return Err(CudaError(format!(
                "{info}: compute capability 8.0 or newer is needed"
            )));
        }
        let open = || -> std::result::Result<Self, DriverError> {
            let device = result::device::get(ordinal as i32)?;
            // SAFETY: the device is valid; the context is released in `drop`.
            let context = unsafe { result::primary_ctx::retain(device) }?;
            // SAFETY: the context is valid.
            unsafe { result::ctx::set_current(context) }?;
            let stream = result::stream::create(result::stream::StreamKind::NonBlocking)?;
            // SAFETY: the image is a fatbin that outlives the call.
            let module = unsafe { result::module::load_data(FATBIN.as_ptr().cast()) }?;
            let mut kernels = HashMap::new();
            for name in KERNELS {
                let c = CString::new(*name).expect("names have no zeros");
                // SAFETY: the module is loaded.
                kernels.insert(*name, unsafe { result::module::get_function(module, c) }?);
            }
            // Off unless asked for, until it has been measured on more devices; graphs know it from CUDA 12.3 on.
            let asked = std::env::var("LEMMA_CUDA_PDL").is_ok_and(|v| v == "1");
            let overlap = asked && info.sm >= (9, 0) && info.driver >= (12, 3);
            Ok(Self {
                overlap,
                info: info.clone(),
                grain: grain(device),
                device,
                context,
                stream,
                module,
                kernels,
                large: Mutex::default(),
            })
        };
        open().map_err(|e| error(&info.to_string(), e))
    }
}

/// Memory of a device that is brought to addresses.
fn memory_of(device: sys::CUdevice) -> sys::CUmemAllocationProp {
    sys::CUmemAllocationProp_st {
        type_: sys::CUmemAllocationType_enum::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: sys::CUmemAllocationHandleType_enum::CU_MEM_HANDLE_TYPE_NONE,
        location: place_of(device),
        win32HandleMetaData: std::ptr::null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    }
}

fn place_of(device: sys::CUdevice) -> sys::CUmemLocation {
    sys::CUmemLocation_st {
        type_: sys::CUmemLocationType_enum::CU_MEM_LOCATION_TYPE_DEVICE,
        id: device,
    }
}

/// Bytes that memory comes in where addresses are reserved before; 0 if the device cannot do that.
fn grain(device: sys::CUdevice) -> usize {
    use sys::CUdevice_attribute as A;
    use sys::CUmemAllocationGranularity_flags_enum as G;
    let can = A::CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED;
    // SAFETY: the device is valid.
    if unsafe { result::device::get_attribute(device, can) }.unwrap_or(0) == 0 {
        return 0;
    }
    let (mut bytes, memory) = (0, memory_of(device));
    let least = G::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
    // SAFETY: both pointers are good for the call.
    let answer =
        unsafe { sys::cuMemGetAllocationGranularity(&raw mut bytes, &raw const memory, least) };
    answer.result().map_or(0, |()| bytes)
}

impl Drop for Driver {
    fn drop(&mut self) {
        // SAFETY: ours, and nobody uses them any more: buffers and graphs hold the device alive.
        unsafe {
            let _ = result::ctx::set_current(self.context);
            let _ = result::stream::synchronize(self.stream);
            let _ = result::module::unload(self.module);
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

impl Device for Driver {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn bind(&self) -> Result<()> {
        // SAFETY: the context is alive.
        unsafe { result::ctx::set_current(self.context) }.map_err(|e| error("CUDA context", e))
    }

    fn alloc(&self, bytes: usize) -> Result<u64> {
        self.bind()?;
        // SAFETY: fresh memory, zeroed before anyone sees it.
        unsafe {
            let at = result::malloc_sync(bytes).map_err(|e| {
                let (free, total) = result::mem_get_info().unwrap_or_default();
                error(
                    &format!(
                        "{} MiB of device memory ({} of {} MiB are free)",
                        bytes >> 20,
                        free >> 20,
                        total >> 20
                    ),
                    e,
                )
            })?;
            result::memset_d8_async(at, 0, bytes, self.stream)
                .map_err(|e| error("cuMemsetD8Async", e))?;
            Ok(at)
        }
    }

    unsafe fn free(&self, at: u64, _: usize) {
        // SAFETY: the caller's promise.
        let freed = unsafe { result::free_sync(at) };
        if let Err(e) = freed {
            log::warn!("{}", error("cuMemFree", e));
        }
    }

    fn grain(&self) -> usize {
        self.grain
    }

    fn reserve(&self, bytes: usize) -> Result<u64> {
        self.bind()?;
        let mut at = 0;
        // SAFETY: the pointer is good for the call.
        let answer = unsafe { sys::cuMemAddressReserve(&raw mut at, bytes, 0, 0, 0) };
        let done = answer.result().map(|()| at);
        done.map_err(|e| error("cuMemAddressReserve", e))
    }

    unsafe fn unreserve(&self, at: u64, bytes: usize) {
        // SAFETY: the caller's promise.
        let freed = unsafe { sys::cuMemAddressFree(at, bytes) }.result();
        if let Err(e) = freed {
            log::warn!("{}", error("cuMemAddressFree", e));
        }
    }

    unsafe fn back(&self, at: u64, bytes: usize) -> Result<u64> {
        self.bind()?;
        let (mut name, memory) = (0, memory_of(self.device));
        let access = sys::CUmemAccessDesc_st {
            location: place_of(self.device),
            flags: sys::CUmemAccess_flags_enum::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // SAFETY: pointers are good for the calls; the address is reserved and free, by the caller's promise. Memory that was made is
        // released if it cannot be brought there.
        unsafe {
            let made = sys::cuMemCreate(&raw mut name, bytes, &raw const memory, 0);
            made.result()
                .map_err(|e| error(&format!("{} MiB of device memory", bytes >> 20), e))?;
            let mapped = sys::cuMemMap(at, bytes, 0, name, 0).result();
            let opened = mapped.and_then(|()| {
                let opened = sys::cuMemSetAccess(at, bytes, &raw const access, 1).result();
                opened
                    .and_then(|()| result::memset_d8_async(at, 0, bytes, self.stream))
                    .inspect_err(|_| {
                        let _ = sys::cuMemUnmap(at, bytes);
                    })
            });
            opened.map_err(|e| {
                let _ = sys::cuMemRelease(name);
                error("device memory that is brought to addresses", e)
            })?;
        }
        Ok(name)
    }

    unsafe fn unback(&self, at: u64, bytes: usize, name: u64) {
        // SAFETY: the caller's promise.
        let freed = unsafe {
            let unmapped = sys::cuMemUnmap(at, bytes).result();
            unmapped.and(sys::cuMemRelease(name).result())
        };
        if let Err(e) = freed {
            log::warn!("{}", error("cuMemUnmap", e));
        }
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) }
            .map_err(|e| error("cuMemcpyDtoDAsync", e))
    }

    fn alloc_host(&self, bytes: usize) -> Result<*mut u8> {
        self.bind()?;
        // Flags 0: cached memory, since the host reads logits from it.
        // SAFETY: no preconditions.
        let at = unsafe { result::malloc_host(bytes, 0) };
        at.map(<*mut c_void>::cast)
            .map_err(|e| error(&format!("{} MiB of page-locked memory", bytes >> 20), e))
    }

    unsafe fn free_host(&self, at: *mut u8, _: usize) {
        // SAFETY: the caller's promise.
        let freed = unsafe { result::free_host(at.cast()) };
        if let Err(e) = freed {
            log::warn!("{}", error("cuMemFreeHost", e));
        }
    }

    unsafe fn upload(&self, to: u64, from: *const u8, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        let answer = unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, self.stream) };
        answer.result().map_err(|e| error("cuMemcpyHtoDAsync", e))
    }

    unsafe fn download(&self, to: *mut u8, from: u64, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        let answer = unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, self.stream) };
        answer.result().map_err(|e| error("cuMemcpyDtoHAsync", e))
    }

    unsafe fn launch(&self, kernel: &'static str, l: Launch, args: &[u8]) -> Result<()> {
        use sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as MAX_SHARED;
        let f = self.kernels[kernel];
        if l.shared > PLAIN_SHARED {
            let mut large = self
                .large
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            let allowed = large.entry(kernel).or_default();
            if *allowed < l.shared {
                // SAFETY: the function is valid.
                let answer = unsafe {
                    result::function::set_function_attribute(f, MAX_SHARED, l.shared as i32)
                };
                answer.map_err(|e| {
                    error(
                        &format!("{kernel} with {} bytes of shared memory", l.shared),
                        e,
                    )
                })?;
                *allowed = l.shared;
            }
        }
        let [x, y, z] = l.grid;
        // The driver copies the arguments during the call; it does not write to them.
        let mut params = [args.as_ptr().cast_mut().cast::<c_void>()];
        use sys::CUlaunchAttributeID_enum as Id;
        let (id, value) = if l.together {
            let value = sys::CUlaunchAttributeValue_union { cooperative: 1 };
            (Id::CU_LAUNCH_ATTRIBUTE_COOPERATIVE, value)
        } else {
            let value = sys::CUlaunchAttributeValue_union {
                programmaticStreamSerializationAllowed: 1,
            };
            (
                Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                value,
            )
        };
        let mut attribute = sys::CUlaunchAttribute_st {
            id,
            pad: [0; 4],
            value,
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: l.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: l.shared,
            hStream: self.stream,
            attrs: &raw mut attribute,
            numAttrs: u32::from(self.overlap || l.together),
        };
        // SAFETY: the caller's promise; each kernel has one parameter.
        let answer = unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                f,
                params.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        answer
            .result()
            .map_err(|e| error(&format!("{kernel} with {l:?}"), e))
    }

    fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream is alive.
        unsafe { result::stream::synchronize(self.stream) }.map_err(|e| error("CUDA", e))
    }

    fn alloc_mark(&self) -> Result<usize> {
        self.bind()?;
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        let event = result::event::create(flags).map_err(|e| error("cuEventCreate", e))?;
        Ok(event as usize)
    }

    unsafe fn free_mark(&self, mark: usize) {
        // SAFETY: the caller's promise.
        let freed = unsafe { result::event::destroy(mark as sys::CUevent) };
        if let Err(e) = freed {
            log::warn!("{}", error("cuEventDestroy", e));
        }
    }

    unsafe fn set_mark(&self, mark: usize) -> Result<()> {
        // SAFETY: the caller's promise; the stream is alive.
        unsafe { result::event::record(mark as sys::CUevent, self.stream) }
            .map_err(|e| error("cuEventRecord", e))
    }

    unsafe fn wait_mark(&self, mark: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { result::event::synchronize(mark as sys::CUevent) }.map_err(|e| error("CUDA", e))
    }

    fn begin_capture(&self) -> Result<()> {
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive.
        unsafe { result::stream::begin_capture(self.stream, mode) }
            .map_err(|e| error("cuStreamBeginCapture", e))
    }

    fn end_capture(&self) -> Result<Box<dyn GraphExec>> {
        // SAFETY: the stream is alive; the graph is destroyed once it is instantiated.
        unsafe {
            let graph = result::stream::end_capture(self.stream)
                .map_err(|e| error("cuStreamEndCapture", e))?;
            let exec = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let _ = result::graph::destroy(graph);
            let exec = exec.map_err(|e| error("cuGraphInstantiate", e))?;
            Ok(Box::new(Exec {
                exec,
                stream: self.stream,
            }))
        }
    }

    fn memory(&self) -> Result<(usize, usize)> {
        self.bind()?;
        result::mem_get_info().map_err(|e| error("cuMemGetInfo", e))
    }
}

struct Exec {
    exec: sys::CUgraphExec,
    stream: sys::CUstream,
}

// SAFETY: handles of the driver may be used from any thread.
unsafe impl Send for Exec {}

impl GraphExec for Exec {
    fn replay(&self) -> Result<()> {
        // SAFETY: both are alive: a `Graph` holds the device.
        unsafe { result::graph::launch(self.exec, self.stream) }
            .map_err(|e| error("cuGraphLaunch", e))
    }
}

impl Drop for Exec {
    fn drop(&mut self) {
        // SAFETY: ours.
        let _ = unsafe { result::graph::exec_destroy(self.exec) };
    }
}
