// The instruction sets that the kernels are built for, and which of them this processor has.
#pragma once

#include <string>
#include <vector>

namespace llfast {

enum class InstructionSet { kPortable, kAvx2, kAvx512, kAvx512BFloat16, kAmxBFloat16 };

const char* name_of(InstructionSet set);

// From the slowest, which is always there, to the fastest.
const std::vector<InstructionSet>& available_instruction_sets();

// The available set of that name; "" means the fastest. Throws std::invalid_argument otherwise.
InstructionSet choose_instruction_set(const std::string& name);

}  // namespace llfast
