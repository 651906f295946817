"""The hash function of the library. hashlib also loads OpenSSL, which takes longer than all of tapes."""

try:
    from _blake2 import blake2b as blake2b
except ImportError:
    from hashlib import blake2b as blake2b
