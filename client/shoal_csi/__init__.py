"""A dataset as a mounted file system: a FUSE server, what keeps it alive, and the CSI driver over both."""
