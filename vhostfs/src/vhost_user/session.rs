//! One frontend, from connect to disconnect.
//!
//! A session executes messages in their order. One that has to wait (until requests under way have ended, or
//! until nobody uses a removed memory region any more) holds back the messages behind it and nothing else:
//! the poller looks again in each turn.
//!
//! What the guest holds in the device (lookups, pins, locks) goes with RESET_DEVICE, with a new FUSE_INIT and with the
//! connection, but not when its rings stop, not even all of them. A frontend stops them by GET_VRING_BASE also when
//! the guest is paused, or saved or moved elsewhere and then not: the driver goes on as if nothing had been. The
//! specification calls a device without a running ring suspended, and has it keep its state. QEMU sends RESET_DEVICE
//! since 8.2 when the driver lets go of the device; of older ones, and of User-Mode Linux, the next FUSE_INIT tells.
//!
//! What is not answered as asked is refused: with an error in the acknowledgement if the frontend wants one,
//! with an empty payload if the message has a reply of its own. Only lost framing ends a connection.

use std::os::fd::OwnedFd;
use std::rc::{Rc, Weak};

use reactor::Reactor;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::connection::{Connection, ConnectionError, Frame};
use super::message::{DecodeError, Message, VringFd};
use crate::descriptor::{Descriptor, DescriptorError};
use crate::device::VirtioDevice;
use crate::events::{EventFd, Events, Key, Kick};
use crate::guest_mem::{GuestMemory, MemoryError, OutsideMemory, Region, RegionDescription};
use crate::log_limit::LogLimit;
use crate::queue::{Queue, QueueError};
use crate::ring::RingFeatures;
use crate::ring::chain::Chain;

/// Messages handled per turn, so that a chatty frontend delays the others little.
const MESSAGES_PER_TURN: usize = 16;

/// Bytes of a configuration space that can be asked for (vhost-user, `VHOST_USER_MAX_CONFIG_SIZE`).
const CONFIG_SPACE_MAX: u32 = 256;

/// Features of every device here, beside those of its type.
const TRANSPORT_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// BACKEND_REQ is here for User-Mode Linux before 6.7, which gives its queues an interrupt only together with
/// that channel; nothing is sent over it.
const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);

/// Why a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SessionEnd {
    /// The connection did.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// The frontend took memory away that it had shared.
    #[error("the frontend shrank its memory")]
    MemoryShrunk,
}

/// Why a message was refused.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(transparent)]
    Decode(#[from] DecodeError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Descriptor(#[from] DescriptorError),
    #[error("ring: {0}")]
    Ring(#[from] OutsideMemory),
    #[error("no queue number {0}")]
    NoSuchQueue(u32),
    #[error("{got} descriptors instead of {expected}")]
    DescriptorCount { got: usize, expected: usize },
    #[error("features {0:#x} were not offered")]
    Features(u64),
    #[error("queue size {0} is not a power of two up to 32768")]
    QueueSize(u32),
    #[error("vring base {0} has more than 16 bits")]
    VringBase(u32),
    #[error("configuration space has no bytes {offset} to {offset} + {size}")]
    Config { offset: u32, size: u32 },
    #[error("the configuration space is read-only")]
    ConfigReadOnly,
}

/// What follows from a message.
enum Outcome {
    /// Done; acknowledged if the frontend asks for that.
    Done,
    /// The message's own reply.
    Reply(Vec<u8>),
    /// Not yet.
    Wait(Condition, Continuation),
}

/// What a message waits for.
enum Condition {
    /// No requests under way in these queues.
    Idle(Vec<Rc<Queue>>),
    /// Nobody uses these regions.
    Unmapped(Vec<Weak<Region>>),
}

impl Condition {
    fn holds(&self) -> bool {
        match self {
            Self::Idle(queues) => queues.iter().all(|queue| !queue.is_busy()),
            Self::Unmapped(regions) => regions.iter().all(|region| region.strong_count() == 0),
        }
    }
}

/// What is left to do then.
#[derive(Clone, Copy)]
enum Continuation {
    Acknowledge,
    VringBase(u32),
    Reset,
}

struct Waiting {
    condition: Condition,
    continuation: Continuation,
    code: u32,
    need_reply: bool,
}

/// One frontend.
pub struct Session {
    connection: Connection,
    events: Rc<Events>,
    device: Rc<dyn VirtioDevice>,
    queues: Vec<Rc<Queue>>,
    memory: Rc<GuestMemory>,
    features: u64,
    protocol_features: VhostUserProtocolFeatures,
    /// Held open, since a frontend may watch its end.
    backend_channel: Option<Descriptor>,
    waiting: Option<Waiting>,
    limit: Rc<LogLimit>,
}

impl Session {
    /// A session over a connected socket. Events of the socket come with `key`.
    ///
    /// # Errors
    /// [`SessionEnd`] when the socket cannot be watched.
    pub fn new(
        socket: OwnedFd,
        device: &Rc<dyn VirtioDevice>,
        events: &Rc<Events>,
        key: Key,
        limit: &Rc<LogLimit>,
    ) -> Result<Self, SessionEnd> {
        Ok(Self {
            connection: Connection::new(socket, events, key)?,
            events: events.clone(),
            device: device.clone(),
            queues: (0..device.queue_count()).map(Queue::new).collect(),
            memory: Rc::default(),
            features: 0,
            protocol_features: VhostUserProtocolFeatures::empty(),
            backend_channel: None,
            waiting: None,
            limit: limit.clone(),
        })
    }

    /// Its queues.
    pub fn queues(&self) -> &[Rc<Queue>] {
        &self.queues
    }

    /// Whether requests are under way.
    pub fn is_busy(&self) -> bool {
        self.queues.iter().any(|queue| queue.is_busy())
    }

    /// An event says that the socket changed.
    pub fn set_readable(&mut self) {
        self.connection.set_readable();
    }

    /// Whether the next turn may find messages.
    pub fn has_messages(&self) -> bool {
        self.waiting.is_none() && self.connection.is_readable()
    }

    /// Ends the session if the frontend shrank its memory.
    ///
    /// # Errors
    /// [`SessionEnd::MemoryShrunk`].
    pub fn check_memory(&self) -> Result<(), SessionEnd> {
        if self.memory.is_broken() { Err(SessionEnd::MemoryShrunk) } else { Ok(()) }
    }

    /// Handles the messages that are there, up to a limit. Returns whether there were any.
    ///
    /// # Errors
    /// [`SessionEnd`]; the session is then to be dropped.
    pub fn handle_messages(&mut self) -> Result<bool, SessionEnd> {
        let mut any = false;
        for _ in 0..MESSAGES_PER_TURN {
            if let Some(waiting) = self.waiting.take_if(|waiting| waiting.condition.holds()) {
                any = true;
                self.resume(&waiting)?;
            }
            if self.waiting.is_some() {
                break;
            }
            let Some(frame) = self.connection.receive()? else { break };
            any = true;
            self.handle(frame)?;
        }
        self.connection.flush()?;
        Ok(any)
    }

    /// Takes a turn's share of requests from queue number `index`. Returns whether there were any.
    pub fn process_queue(&self, index: usize, reactor: &Reactor, chain: &mut Chain) -> bool {
        let queue = &self.queues[index];
        queue.process(&self.device, reactor, chain).unwrap_or_else(|error| {
            self.report_broken(queue, &error);
            true
        })
    }

    #[cold]
    fn report_broken(&self, queue: &Queue, error: &QueueError) {
        if self.limit.allows() {
            tracing::warn!(queue = queue.index(), "queue is broken: {error}");
        }
    }

    fn handle(&mut self, frame: Frame) -> Result<(), ConnectionError> {
        let Frame { code, need_reply, payload, fds } = frame;
        let result = Message::decode(code, &payload).map_err(Refusal::from);
        match result.and_then(|message| self.execute(message, fds)) {
            Ok(Outcome::Done) => self.acknowledge(code, need_reply, true)?,
            Ok(Outcome::Reply(payload)) => self.connection.reply(code, &payload)?,
            Ok(Outcome::Wait(condition, continuation)) => {
                self.waiting = Some(Waiting { condition, continuation, code, need_reply });
            }
            Err(refusal) => {
                if self.limit.allows() {
                    tracing::warn!(message = code, "message from frontend refused: {refusal}");
                }
                if Message::has_reply(code) {
                    self.connection.reply(code, &[])?;
                } else {
                    self.acknowledge(code, need_reply, false)?;
                }
            }
        }
        self.attach_queues();
        Ok(())
    }

    fn acknowledge(&mut self, code: u32, need_reply: bool, success: bool) -> Result<(), ConnectionError> {
        if need_reply && self.protocol_features.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            return self.connection.reply(code, &word(u64::from(!success)));
        }
        Ok(())
    }

    fn resume(&mut self, waiting: &Waiting) -> Result<(), ConnectionError> {
        match waiting.continuation {
            Continuation::Acknowledge => self.acknowledge(waiting.code, waiting.need_reply, true),
            Continuation::VringBase(index) => {
                let base = self.queues[index as usize].detach();
                self.connection.reply(waiting.code, &vring_state(index, base.into()))
            }
            Continuation::Reset => {
                for queue in &self.queues {
                    queue.close();
                }
                self.device.reset();
                self.acknowledge(waiting.code, waiting.need_reply, true)
            }
        }
    }

    fn attach_queues(&self) {
        for queue in &self.queues {
            if let Err(error) = queue.attach(&self.memory) {
                self.report_broken(queue, &error);
            }
        }
    }

    fn queue(&self, index: u32) -> Result<&Rc<Queue>, Refusal> {
        self.queues.get(index as usize).ok_or(Refusal::NoSuchQueue(index))
    }

    fn execute(&mut self, message: Message, mut fds: Vec<Descriptor>) -> Result<Outcome, Refusal> {
        match message {
            Message::GetFeatures => return Ok(Outcome::Reply(word(self.offered_features()).into())),
            Message::SetFeatures(features) => self.set_features(features)?,
            Message::GetProtocolFeatures => return Ok(Outcome::Reply(word(PROTOCOL_FEATURES.bits()).into())),
            Message::SetProtocolFeatures(features) => {
                self.protocol_features = VhostUserProtocolFeatures::from_bits(features)
                    .filter(|features| PROTOCOL_FEATURES.contains(*features))
                    .ok_or(Refusal::Features(features))?;
            }
            Message::SetOwner => {}
            Message::ResetOwner => self.queues.iter().for_each(|queue| queue.set_enabled(false)),
            Message::GetQueueNum => return Ok(Outcome::Reply(word(self.queues.len() as u64).into())),
            Message::GetMaxMemSlots => {
                return Ok(Outcome::Reply(word(GuestMemory::REGIONS_MAX as u64).into()));
            }
            Message::SetMemTable(regions) => return self.set_memory_table(&regions, &mut fds),
            Message::AddMemReg(region) => self.add_region(region, fds)?,
            Message::RemMemReg(region) => return self.remove_region(&region),
            Message::SetVringNum { index, num } => {
                if !self.queue(index)?.set_size(num) {
                    return Err(Refusal::QueueSize(num));
                }
            }
            Message::SetVringAddr { index, addresses } => {
                self.queue(index)?.set_addresses(&self.memory, addresses)?;
            }
            Message::SetVringBase { index, base } => {
                let base = u16::try_from(base).map_err(|_| Refusal::VringBase(base))?;
                self.queue(index)?.set_base(base);
            }
            Message::GetVringBase { index } => {
                let queue = self.queue(index)?.clone();
                queue.stop();
                return Ok(Outcome::Wait(Condition::Idle(vec![queue]), Continuation::VringBase(index)));
            }
            Message::SetVringKick(vring) => {
                let kick = match vring_fd(vring, fds)? {
                    Some(fd) => Kick::watch(fd, &self.events)?,
                    None => Kick::Polled,
                };
                self.queue(vring.index)?.set_kick(kick);
            }
            Message::SetVringCall(vring) => {
                let call = vring_fd(vring, fds)?.map(EventFd::new).transpose()?;
                self.queue(vring.index)?.set_call(call);
            }
            Message::SetVringErr(vring) => {
                let error = vring_fd(vring, fds)?.map(EventFd::new).transpose()?;
                self.queue(vring.index)?.set_error(error);
            }
            Message::SetVringEnable { index, enable } => {
                let queue = self.queue(index)?.clone();
                queue.set_enabled(enable);
                if !enable {
                    // A frontend that never sends GET_VRING_BASE reuses the memory after this.
                    return Ok(Outcome::Wait(Condition::Idle(vec![queue]), Continuation::Acknowledge));
                }
            }
            Message::SetBackendReqFd => self.backend_channel = Some(only_fd(fds)?),
            Message::GetConfig { offset, size } => return self.read_config(offset, size).map(Outcome::Reply),
            Message::SetConfig => return Err(Refusal::ConfigReadOnly),
            Message::ResetDevice => {
                self.queues.iter().for_each(|queue| queue.set_enabled(false));
                return Ok(Outcome::Wait(Condition::Idle(self.queues.clone()), Continuation::Reset));
            }
        }
        Ok(Outcome::Done)
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    fn set_features(&mut self, features: u64) -> Result<(), Refusal> {
        let unknown = features & !self.offered_features();
        if unknown != 0 {
            return Err(Refusal::Features(unknown));
        }
        self.features = features;
        let has = |bit: u32| features & (1 << bit) != 0;
        let ring = RingFeatures {
            indirect: has(VIRTIO_RING_F_INDIRECT_DESC),
            event_index: has(VIRTIO_RING_F_EVENT_IDX),
        };
        let enabled_at_start = features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0;
        for queue in &self.queues {
            queue.set_features(ring);
            if enabled_at_start {
                queue.set_enabled(true);
            }
        }
        Ok(())
    }

    fn set_memory_table(
        &mut self,
        regions: &[RegionDescription],
        fds: &mut [Descriptor],
    ) -> Result<Outcome, Refusal> {
        if fds.len() != regions.len() {
            return Err(Refusal::DescriptorCount { got: fds.len(), expected: regions.len() });
        }
        let mapped = regions.iter().zip(fds).map(|(region, fd)| Region::map(*region, fd));
        let memory = GuestMemory::new(mapped.collect::<Result<_, _>>()?)?;
        let removed = self.memory.regions().iter().map(Rc::downgrade).collect();
        self.replace_memory(memory);
        Ok(Outcome::Wait(Condition::Unmapped(removed), Continuation::Acknowledge))
    }

    fn add_region(&mut self, region: RegionDescription, fds: Vec<Descriptor>) -> Result<(), Refusal> {
        let memory = self.memory.with(Region::map(region, &mut only_fd(fds)?)?)?;
        self.replace_memory(memory);
        Ok(())
    }

    fn remove_region(&mut self, region: &RegionDescription) -> Result<Outcome, Refusal> {
        let (memory, removed) = self.memory.without(region)?;
        self.replace_memory(memory);
        Ok(Outcome::Wait(Condition::Unmapped(vec![Rc::downgrade(&removed)]), Continuation::Acknowledge))
    }

    fn replace_memory(&mut self, memory: Rc<GuestMemory>) {
        self.memory = memory;
        for queue in &self.queues {
            if let Err(error) = queue.remap(&self.memory) {
                self.report_broken(queue, &error);
            }
        }
    }

    /// Bytes behind the device's own configuration read as zeros: frontends ask for more than there is.
    fn read_config(&self, offset: u32, size: u32) -> Result<Vec<u8>, Refusal> {
        let end = offset.checked_add(size).filter(|end| *end <= CONFIG_SPACE_MAX);
        let Some(end) = end else { return Err(Refusal::Config { offset, size }) };
        let config = self.device.config();
        let byte = |at: u32| config.get(at as usize).copied().unwrap_or(0);
        let mut reply = words([offset, size, 0]);
        reply.extend((offset..end).map(byte));
        Ok(reply)
    }
}

impl Drop for Session {
    /// The frontend is gone: late answers are dropped, and what its guest held is forgotten.
    fn drop(&mut self) {
        for queue in &self.queues {
            queue.close();
        }
        self.device.reset();
    }
}

fn only_fd(fds: Vec<Descriptor>) -> Result<Descriptor, Refusal> {
    <[Descriptor; 1]>::try_from(fds)
        .map(|[fd]| fd)
        .map_err(|fds| Refusal::DescriptorCount { got: fds.len(), expected: 1 })
}

fn vring_fd(vring: VringFd, fds: Vec<Descriptor>) -> Result<Option<Descriptor>, Refusal> {
    if !vring.has_fd && fds.is_empty() { Ok(None) } else { only_fd(fds).map(Some) }
}

#[expect(clippy::host_endian_bytes, reason = "vhost-user is a protocol between processes of one machine")]
fn word(value: u64) -> [u8; 8] {
    value.to_ne_bytes()
}

fn words(values: impl IntoIterator<Item = u32>) -> Vec<u8> {
    values.into_iter().flat_map(u32::to_ne_bytes).collect()
}

fn vring_state(index: u32, num: u32) -> Vec<u8> {
    words([index, num])
}
