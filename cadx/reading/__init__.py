"""Files as they come -> arrays, geometry and what they say of patient group and machine.

The only package that opens medical formats. Invariants: a file is known by its first bytes, never by its
name; unknown geometry or meaning is refused or recorded as an assumption, never guessed; no message, log
line or warning repeats a value or a file name, since either may carry a patient's name.
"""
