// Instruction sets: what was built, what this processor runs, and which one is in use.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace fastattn {

std::vector<std::string> isas();
std::vector<std::string> isas_available();
std::string isa();

// Throws std::invalid_argument when the set is unknown, not built, or not run by this processor.
void set_isa(const std::string& name);

// The kernels of the set in use: the widest that is available, unless FASTATTN_ISA names another.
const Kernels& kernels();

}  // namespace fastattn
