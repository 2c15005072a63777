//! The QEMU monitor and guest agent, for a controller. Knows nothing of backup.
