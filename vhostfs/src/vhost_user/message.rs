//! Decoding of messages (vhost-user specification, "Message Specification" and "Front-end message types").
//!
//! All numbers are in the machine's byte order, as the specification says.

use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfig, VhostUserMemory, VhostUserMemoryRegion, VhostUserVringAddr,
    VhostUserVringState,
};
use vm_memory::ByteValued;

use crate::guest_mem::RegionDescription;
use crate::ring::RingAddresses;

/// Bytes of `struct VhostUserMemoryRegion`.
const REGION_LEN: usize = size_of::<VhostUserMemoryRegion>();

/// SET_MEM_TABLE of User-Mode Linux: room for two regions however many there are.
const UML_MEM_TABLE_LEN: usize = size_of::<VhostUserMemory>() + 2 * REGION_LEN;

/// In the payload of SET_VRING_KICK, CALL and ERR: queue number, and the flag for "no descriptor".
const VRING_INDEX_MASK: u64 = 0xff;
const VRING_NO_FD: u64 = 0x100;

/// A message that cannot be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// A payload of another size than the message has.
    #[error("payload of {len} bytes")]
    Size {
        /// Its length.
        len: usize,
    },
    /// A message that this backend does not know.
    #[error("unknown message")]
    Unknown,
}

/// The descriptor message of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringFd {
    /// Queue number.
    pub index: u32,
    /// Whether a descriptor comes with the message.
    pub has_fd: bool,
}

/// What a frontend asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as in the specification, which documents them")]
pub enum Message {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<RegionDescription>),
    SetVringNum { index: u32, num: u32 },
    SetVringAddr { index: u32, addresses: RingAddresses },
    SetVringBase { index: u32, base: u32 },
    GetVringBase { index: u32 },
    SetVringKick(VringFd),
    SetVringCall(VringFd),
    SetVringErr(VringFd),
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable { index: u32, enable: bool },
    SetBackendReqFd,
    GetConfig { offset: u32, size: u32 },
    SetConfig,
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(RegionDescription),
    RemMemReg(RegionDescription),
}

impl Message {
    /// Decodes the payload of message number `code`.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(code: u32, payload: &[u8]) -> Result<Self, DecodeError> {
        let request = FrontendReq::try_from(code).map_err(|_| DecodeError::Unknown)?;
        Ok(match request {
            FrontendReq::GET_FEATURES => Self::GetFeatures,
            FrontendReq::SET_FEATURES => Self::SetFeatures(word(payload)?),
            FrontendReq::SET_OWNER => Self::SetOwner,
            FrontendReq::RESET_OWNER => Self::ResetOwner,
            FrontendReq::SET_MEM_TABLE => Self::SetMemTable(memory_table(payload)?),
            FrontendReq::SET_VRING_NUM => {
                let VhostUserVringState { index, num } = exact(payload)?;
                Self::SetVringNum { index, num }
            }
            FrontendReq::SET_VRING_ADDR => vring_addr(&exact(payload)?),
            FrontendReq::SET_VRING_BASE => {
                let VhostUserVringState { index, num } = exact(payload)?;
                Self::SetVringBase { index, base: num }
            }
            FrontendReq::GET_VRING_BASE => {
                Self::GetVringBase { index: exact::<VhostUserVringState>(payload)?.index }
            }
            FrontendReq::SET_VRING_KICK => Self::SetVringKick(vring_fd(payload)?),
            FrontendReq::SET_VRING_CALL => Self::SetVringCall(vring_fd(payload)?),
            FrontendReq::SET_VRING_ERR => Self::SetVringErr(vring_fd(payload)?),
            FrontendReq::GET_PROTOCOL_FEATURES => Self::GetProtocolFeatures,
            FrontendReq::SET_PROTOCOL_FEATURES => Self::SetProtocolFeatures(word(payload)?),
            FrontendReq::GET_QUEUE_NUM => Self::GetQueueNum,
            FrontendReq::SET_VRING_ENABLE => {
                let VhostUserVringState { index, num } = exact(payload)?;
                Self::SetVringEnable { index, enable: num != 0 }
            }
            FrontendReq::GET_CONFIG => {
                let VhostUserConfig { offset, size, .. } = leading(payload)?;
                Self::GetConfig { offset, size }
            }
            FrontendReq::SET_BACKEND_REQ_FD => Self::SetBackendReqFd,
            FrontendReq::SET_CONFIG => Self::SetConfig,
            FrontendReq::RESET_DEVICE => Self::ResetDevice,
            FrontendReq::GET_MAX_MEM_SLOTS => Self::GetMaxMemSlots,
            FrontendReq::ADD_MEM_REG => Self::AddMemReg(single_region(payload)?),
            FrontendReq::REM_MEM_REG => Self::RemMemReg(single_region(payload)?),
            _ => return Err(DecodeError::Unknown),
        })
    }

    /// Whether the specification gives the message a reply of its own.
    pub fn has_reply(code: u32) -> bool {
        matches!(
            FrontendReq::try_from(code),
            Ok(FrontendReq::GET_FEATURES
                | FrontendReq::GET_PROTOCOL_FEATURES
                | FrontendReq::GET_VRING_BASE
                | FrontendReq::GET_QUEUE_NUM
                | FrontendReq::GET_CONFIG
                | FrontendReq::GET_MAX_MEM_SLOTS
                | FrontendReq::GET_INFLIGHT_FD
                | FrontendReq::GET_STATUS
                | FrontendReq::GET_SHARED_OBJECT
                | FrontendReq::GET_SHMEM_CONFIG
                | FrontendReq::SET_DEVICE_STATE_FD
                | FrontendReq::CHECK_DEVICE_STATE
                | FrontendReq::POSTCOPY_ADVISE
                | FrontendReq::CREATE_CRYPTO_SESSION)
        )
    }
}

fn size_error(payload: &[u8]) -> DecodeError {
    DecodeError::Size { len: payload.len() }
}

/// The struct that the payload begins with. All these structs are packed, so any address will do.
fn leading<T: ByteValued>(payload: &[u8]) -> Result<T, DecodeError> {
    const { assert!(align_of::<T>() == 1) };
    payload.get(..size_of::<T>()).and_then(T::from_slice).copied().ok_or_else(|| size_error(payload))
}

fn exact<T: ByteValued>(payload: &[u8]) -> Result<T, DecodeError> {
    if payload.len() == size_of::<T>() { leading(payload) } else { Err(size_error(payload)) }
}

fn word(payload: &[u8]) -> Result<u64, DecodeError> {
    payload.try_into().map(u64::from_ne_bytes).map_err(|_| size_error(payload))
}

fn vring_fd(payload: &[u8]) -> Result<VringFd, DecodeError> {
    let value = word(payload)?;
    Ok(VringFd { index: (value & VRING_INDEX_MASK) as u32, has_fd: value & VRING_NO_FD == 0 })
}

fn vring_addr(addr: &VhostUserVringAddr) -> Message {
    let addresses =
        RingAddresses { descriptors: addr.descriptor, available: addr.available, used: addr.used };
    Message::SetVringAddr { index: addr.index, addresses }
}

fn region(region: &VhostUserMemoryRegion) -> RegionDescription {
    RegionDescription {
        gpa: region.guest_phys_addr,
        uva: region.user_addr,
        len: region.memory_size,
        mmap_offset: region.mmap_offset,
    }
}

/// A padding word, then one region.
fn single_region(payload: &[u8]) -> Result<RegionDescription, DecodeError> {
    let body = payload.get(8..).ok_or_else(|| size_error(payload))?;
    exact(body).map(|raw| region(&raw)).map_err(|_| size_error(payload))
}

fn memory_table(payload: &[u8]) -> Result<Vec<RegionDescription>, DecodeError> {
    let header: VhostUserMemory = leading(payload)?;
    let body = &payload[size_of::<VhostUserMemory>()..];
    let expected =
        (header.num_regions as usize).checked_mul(REGION_LEN).ok_or_else(|| size_error(payload))?;
    let from_uml = header.num_regions == 1 && payload.len() == UML_MEM_TABLE_LEN;
    if body.len() != expected && !from_uml {
        return Err(size_error(payload));
    }
    body[..expected].chunks_exact(REGION_LEN).map(|chunk| Ok(region(&exact(chunk)?))).collect()
}
