#include "instruction_set.h"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace llfast {
namespace {

#if defined(__x86_64__)
// __builtin_cpu_supports also asks the operating system whether it saves the wide registers. It
// does not know "f16c" in every compiler that we accept, so that bit is read here.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & (1u << 29)) != 0;
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return __builtin_cpu_supports("avx512bf16"); }

// Tiles are kept for a process that asked for them: Linux's documentation, arch/x86/xstate.
bool has_amx_bf16() {
  constexpr unsigned kBFloat16 = 1u << 22;
  constexpr unsigned kTile = 1u << 24;
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kBFloat16) != 0 &&
         (edx & kTile) != 0 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

std::vector<InstructionSet> detect() {
  std::vector<InstructionSet> sets = {InstructionSet::kPortable};
#if defined(__x86_64__)
  if (has_avx2()) {
    sets.push_back(InstructionSet::kAvx2);
    if (has_avx512()) {
      sets.push_back(InstructionSet::kAvx512);
      if (has_avx512_bf16()) {
        sets.push_back(InstructionSet::kAvx512BFloat16);
        if (has_amx_bf16()) sets.push_back(InstructionSet::kAmxBFloat16);
      }
    }
  }
#endif
  return sets;
}

}  // namespace

const char* name_of(InstructionSet set) {
  switch (set) {
    case InstructionSet::kAmxBFloat16:
      return "amx_bf16";
    case InstructionSet::kAvx512BFloat16:
      return "avx512_bf16";
    case InstructionSet::kAvx512:
      return "avx512";
    case InstructionSet::kAvx2:
      return "avx2";
    case InstructionSet::kPortable:
      break;
  }
  return "portable";
}

const std::vector<InstructionSet>& available_instruction_sets() {
  // Asked once: CPUID leaves a virtual machine, which takes tens of microseconds.
  static const std::vector<InstructionSet> sets = detect();
  return sets;
}

InstructionSet choose_instruction_set(const std::string& name) {
  const std::vector<InstructionSet>& sets = available_instruction_sets();
  if (name.empty()) return sets.back();
  std::string names;
  for (const InstructionSet set : sets) {
    if (name == name_of(set)) return set;
    names += (names.empty() ? "" : ", ") + std::string(name_of(set));
  }
  throw std::invalid_argument("LLFAST_ISA must name an instruction set of this processor (" +
                              names + "), got '" + name + "'; correct it or unset it");
}

}  // namespace llfast
