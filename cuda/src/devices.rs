//! What CUDA devices there are.

use std::fmt;

/// A CUDA device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its place in the driver's list.
    pub ordinal: u32,
    /// Its name as the driver gives it.
    pub name: String,
    /// Compute capability, major and minor.
    pub sm: (u32, u32),
    /// Multiprocessors.
    pub n_sm: u32,
    /// Bytes of its memory.
    pub memory: u64,
    /// CUDA version that the driver supports, major and minor.
    pub driver: (u32, u32),
}

impl fmt::Display for DeviceInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gib = self.memory as f64 / f64::from(1 << 30);
        let ((major, minor), (d0, d1)) = (self.sm, self.driver);
        write!(
            f,
            "CUDA{}: {} (sm_{major}{minor}, {} SMs, {gib:.1} GiB, driver for CUDA {d0}.{d1})",
            self.ordinal, self.name, self.n_sm
        )
    }
}

/// Answer of [`devices`].
#[derive(Clone, Debug, Default)]
pub struct Devices {
    /// The devices that can be used.
    pub list: Vec<DeviceInfo>,
    /// Why there are none, if there are none.
    pub reason: Option<String>,
}

/// Finds the CUDA devices. Never fails and never panics: without a driver the list is empty and the reason says so.
pub fn devices() -> Devices {
    let found = probe();
    match found {
        Ok(list) if list.is_empty() => Devices {
            list,
            reason: Some("the CUDA driver finds no device".to_owned()),
        },
        Ok(list) => Devices { list, reason: None },
        Err(reason) => Devices {
            list: Vec::new(),
            reason: Some(reason),
        },
    }
}

#[cfg(feature = "cuda")]
use crate::driver::probe;

#[cfg(not(feature = "cuda"))]
fn probe() -> Result<Vec<DeviceInfo>, String> {
    Err("this program was built without CUDA (cargo feature `cuda`)".to_owned())
}
