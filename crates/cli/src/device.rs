//! The device that computes, among those that this build has.
//!
//! Verbs get their device here and hand it down: no other file of the program names one.

use burn::tensor::Device;

/// Name of the default device.
pub(crate) const CPU: &str = "cpu";

/// The device of verbs without `--device`.
pub(crate) fn default_device() -> Device {
    Device::flex()
}

/// A value of `--device`.
pub(crate) fn parse(name: &str) -> Result<Device, String> {
    match name {
        CPU => Ok(default_device()),
        _ => Err(format!("this build has one device, {CPU}")),
    }
}
