//! Several byte strings in one input: two bytes of length before each but the last.

/// Most parts of an input: sessions wait between them.
const PARTS_MAX: usize = 16;

/// The parts of any input.
#[allow(dead_code, reason = "seeds.rs only encodes")]
pub fn decode(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut parts = Vec::new();
    while parts.len() + 1 < PARTS_MAX
        && let Some((len, rest)) = bytes.split_at_checked(2)
        && let Some((part, rest)) =
            rest.split_at_checked(usize::from(u16::from_be_bytes([len[0], len[1]])))
    {
        parts.push(part.to_vec());
        bytes = rest;
    }
    parts.push(bytes.to_vec());
    parts
}

/// The input that has these parts.
#[allow(dead_code, reason = "targets only decode")]
pub fn encode(parts: &[Vec<u8>]) -> Vec<u8> {
    let mut out = Vec::new();
    for part in &parts[..parts.len().saturating_sub(1)] {
        out.extend(u16::try_from(part.len()).expect("kept inputs are small").to_be_bytes());
        out.extend(part);
    }
    out.extend(parts.last().into_iter().flatten());
    out
}
