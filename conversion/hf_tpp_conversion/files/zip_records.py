"""The records of a zip file, as structs: what torch's archives consist of beside their storages."""

import struct

__all__ = ["CENTRAL", "END", "END64", "LOCAL", "LOCATOR"]

END = struct.Struct("<4sHHHHIIH")
END64 = struct.Struct("<4sQHHIIQQQQ")
LOCATOR = struct.Struct("<4sIQI")
CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
LOCAL = struct.Struct("<4sHHHHHIIIHH")
