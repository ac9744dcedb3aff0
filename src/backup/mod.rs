//! Files in, packs and a commit object out.
