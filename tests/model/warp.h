// CUDA's words for a compiler of C++, enough for backward.cu: a warp is 32 contexts of one thread, which take turns at
// every shuffle. All lanes must come to the same line, or the process ends: that would hang or go wrong on a device.
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#undef INFINITY
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Three { int x, y, z; };
struct float2 { float x, y; };
static Three threadIdx, blockIdx;

static float2 make_float2(float x, float y) { return {x, y}; }
static float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
static float __int_as_float(int bits) { return __uint_as_float((unsigned)bits); }
static unsigned bits_of(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
#define __expf std::exp
static float __fdividef(float x, float y) { return x / y; }
static float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
template <typename T> static T __ldg(const T* place) { return *place; }
template <typename T> static T settled(T x) { return x; }
static void add_share(float* place, float share, float x) { if (share != 0.0f) *place += share * x; }

static float from_half(unsigned short bits) { _Float16 x; std::memcpy(&x, &bits, 2); return (float)x; }
static unsigned short to_half(float x) {
  const _Float16 half = (_Float16)x;
  unsigned short bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
static unsigned short to_bfloat16(float x) {
  if (std::isnan(x)) return 0x7fff;
  const unsigned bits = bits_of(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static ucontext_t scheduler, lanes[32];
static int current, lines[32], turn[32];
static bool ended[32];
static unsigned slots[2][32];

// Gives what each lane has brought; the other half of the slots is for the next shuffle, so one round is enough.
static const unsigned* meet(unsigned brought, int line) {
  const int lane = current, half = turn[lane]++ & 1;
  slots[half][lane] = brought;
  lines[lane] = line;
  swapcontext(&lanes[lane], &scheduler);
  return slots[half];
}

static float from(const unsigned* all, int lane, float) { return __uint_as_float(all[lane]); }
static int from(const unsigned* all, int lane, int) { return (int)all[lane]; }
static unsigned as_bits(float x) { return bits_of(x); }
static unsigned as_bits(int x) { return (unsigned)x; }
template <typename T> static T shuffled(T x, int line, int source) {
  return from(meet(as_bits(x), line), source & 31, x);
}
static unsigned ballot(bool x, int line) {
  const unsigned* all = meet(x, line);
  unsigned found = 0;
  for (int lane = 0; lane < 32; ++lane) found |= all[lane] << lane;
  return found;
}
#define __shfl_sync(mask, x, source) shuffled(x, __LINE__, source)
#define __shfl_xor_sync(mask, x, bits) shuffled(x, __LINE__, current ^ (bits))
#define __ballot_sync(mask, x) ballot(x, __LINE__)

static void (*kernel_of_lane)();
static void run_lane() {
  kernel_of_lane();
  ended[current] = true;
  lines[current] = -1;
  swapcontext(&lanes[current], &scheduler);
}

// All lanes of one warp, up to the end.
static void run_warp(void (*kernel)(), int first_thread) {
  static std::vector<char> stacks(32 << 16);
  kernel_of_lane = kernel;
  for (current = 0; current < 32; ++current) {
    getcontext(&lanes[current]);
    lanes[current].uc_stack.ss_sp = stacks.data() + (current << 16);
    lanes[current].uc_stack.ss_size = 1 << 16;
    lanes[current].uc_link = nullptr;
    makecontext(&lanes[current], run_lane, 0);
    ended[current] = false;
    turn[current] = 0;
  }
  while (!ended[0]) {
    for (current = 0; current < 32; ++current) {
      threadIdx.x = first_thread + current;
      swapcontext(&scheduler, &lanes[current]);
    }
    for (int lane = 1; lane < 32; ++lane) {
      if (lines[lane] != lines[0]) {
        std::fprintf(stderr, "lane %d is at line %d, lane 0 at line %d\n", lane, lines[lane], lines[0]);
        std::exit(1);
      }
    }
  }
}

#include "backward.cu"

static const typename Value::Bits *grad_out_, *value_;
static const float* reference_;
static const typename Offset::Bits* offsets_;
static const typename Logit::Bits* logits_;
static float *grad_value_, *grad_reference_;
static typename Offset::Bits* grad_offsets_;
static typename Logit::Bits* grad_logits_;
static int num_queries_, num_tokens_, sizes_[8];

static void kernel() {
  deformable_attention_backward(grad_out_, value_, reference_, offsets_, logits_, grad_value_, grad_reference_,
      grad_offsets_, grad_logits_, num_queries_, num_tokens_, sizes_[0], sizes_[1], sizes_[2], sizes_[3], sizes_[4],
      sizes_[5], sizes_[6], sizes_[7]);
}

extern "C" void launch(int blocks, int images_and_heads, void** arguments) {
  grad_out_ = *(typename Value::Bits**)arguments[0];
  value_ = *(typename Value::Bits**)arguments[1];
  reference_ = *(float**)arguments[2];
  offsets_ = *(typename Offset::Bits**)arguments[3];
  logits_ = *(typename Logit::Bits**)arguments[4];
  grad_value_ = *(float**)arguments[5];
  grad_reference_ = *(float**)arguments[6];
  grad_offsets_ = *(typename Offset::Bits**)arguments[7];
  grad_logits_ = *(typename Logit::Bits**)arguments[8];
  num_queries_ = *(int*)arguments[9];
  num_tokens_ = *(int*)arguments[10];
  for (int level = 0; level < 8; ++level) sizes_[level] = *(int*)arguments[11 + level];
  for (blockIdx.y = 0; blockIdx.y < images_and_heads; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
      for (int warp = 0; warp < WARPS; ++warp) run_warp(kernel, 32 * warp);
}
