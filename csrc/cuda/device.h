// Which devices the kernels run on.
#pragma once

#include <string>

namespace fastattn::cuda {

// Why no kernel can run on a device, as "no NVIDIA driver, or too old a one" or "compute
// capability 7.5 < 8.0"; empty if they can. It takes long: ask once a device.
std::string device_refusal(int device);

// Makes a device the current one of this thread, as torch has made it: the runtime that is linked
// here may be another than torch's.
void use_device(int device);

}  // namespace fastattn::cuda
