// The gradients of multi-scale deformable attention (arXiv 2010.04159, section 4), in CUDA C++ for NVRTC; launched by
// cuda_kernels.py.
//
// One warp computes one query of one head, whose DIM = 32 channels lie along the lanes.
//
// 1. One lane, one point: softmax, place, the shares of the four cells around it. LEVELS * POINTS <= 32 points.
// 2. The points one after the other, their numbers sent to all lanes by shuffles:
//    - Values: neighbours in a row of a map are neighbours in memory, so half of the warp reads the left cell and half
//      the right one, two channels a lane. A tree of shuffles adds up the products with grad_out of sixteen points at
//      once, and leaves each sum in the lane of its point.
//    - Gradient of the values: one channel a lane, so that each addition is one row of 128 bytes.
// 3. One lane, one point again: gradients of logits and offsets, which neighbouring lanes write to neighbouring places.
//    What step 1 read and computed for it, but for the weight, is read and computed once more: the registers that would
//    keep it through step 2 are worth more as room for further warps.
//
// Nothing is shared but by shuffles, so there is no barrier. All sums and places are float32. Levels and points are
// unrolled; sizes of maps are plain arguments, so that other maps need no other code.
//
// Macros: HEADS, LEVELS, POINTS, COORDINATES (2 points, 4 boxes), REFERENCE_GRADIENT (0, 1), WARPS of a block,
// MIN_BLOCKS of a multiprocessor; VALUE, OFFSET, LOGIT: the type of numbers, FLOAT32, BFLOAT16 or FLOAT16.

#define FLOAT32 0
#define BFLOAT16 1
#define FLOAT16 2
#define DIM 32
#define COUNT (LEVELS * POINTS)
#define ALL 0xffffffffu
#define INLINE __device__ __forceinline__
#define INFINITY __int_as_float(0x7f800000)

static_assert(COUNT <= 32, "a lane has one point at most");
static_assert(LEVELS <= 8, "there are arguments for the sizes of eight levels");

#ifdef __CUDACC__  // the header of the emulation has its own
INLINE float from_half(unsigned short bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
INLINE unsigned short to_half(float x) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
INLINE unsigned short to_bfloat16(float x) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
// The same pointer or number, of which the compiler does not know whence it comes. Otherwise it would compute each
// address from the very first pointer, and keep in registers for step 3 what step 1 computed. Numbers are signed: with
// unsigned ones NVRTC 13.0 spilled some.
template <typename T> INLINE T* settled(T* place) {
  asm("" : "+l"(place));
  return place;
}
INLINE int settled(int x) {
  asm volatile("" : "+r"(x));  // volatile: stays between the additions before and after it
  return x;
}
// Adds share * x where the share is not 0. As an `if`, the compiler makes it a branch, past which it moves no load.
INLINE void add_share(float* place, float share, float x) {
  asm volatile("{.reg .pred some; setp.neu.f32 some, %1, 0f00000000; @some red.relaxed.gpu.global.add.f32 [%0], %2;}"
               :: "l"(__cvta_generic_to_global(place)), "f"(share), "f"(share * x));
}
#endif

// Bits of numbers, their values, and back. A pair is two numbers, one after the other, read or written as one.
template <int TYPE> struct Number { typedef unsigned short Bits; typedef unsigned Pair; };
template <> struct Number<FLOAT32> { typedef float Bits; typedef float2 Pair; };
typedef Number<VALUE> Value;
typedef Number<OFFSET> Offset;
typedef Number<LOGIT> Logit;

template <int TYPE> INLINE float number(typename Number<TYPE>::Bits bits) {
  if constexpr (TYPE == FLOAT32) return bits;
  else if constexpr (TYPE == BFLOAT16) return __uint_as_float((unsigned)bits << 16);
  else return from_half(bits);
}

template <int TYPE> INLINE float2 numbers(typename Number<TYPE>::Pair pair) {
  if constexpr (TYPE == FLOAT32) return pair;
  else if constexpr (TYPE == BFLOAT16)
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  else return make_float2(from_half(pair & 0xffffu), from_half(pair >> 16));
}

template <int TYPE> INLINE typename Number<TYPE>::Bits rounded(float x) {
  if constexpr (TYPE == FLOAT32) return x;
  else if constexpr (TYPE == BFLOAT16) return to_bfloat16(x);
  else return to_half(x);
}

template <int TYPE> INLINE typename Number<TYPE>::Pair rounded(float x, float y) {
  if constexpr (TYPE == FLOAT32) return make_float2(x, y);
  else return (unsigned)rounded<TYPE>(x) | (unsigned)rounded<TYPE>(y) << 16;
}

INLINE float largest_of_warp(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
  return x;
}

INLINE float sum_of_warp(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
  return x;
}

// What the lanes know while they go through the points.
struct Warp {
  const typename Value::Bits* value;  // of the image and head, at this lane's two channels, in the left or right cell
  float* grad_value;                  // of the image and head, at the one channel of this lane
  float2 grad_pair;                   // grad_out at the two channels
  float grad;                         // and at the one
  unsigned upper, lower;              // bit p: whether point p has a cell in this half, in its upper and lower row
  int lane;
  int width[LEVELS];
  int cell;  // from here on, numbers of this lane's point; this is the upper left one, counted over all maps
  float upper_left, upper_right, lower_left, lower_right;  // shares of the cells times the weight; 0 outside the map
};

INLINE float product(const Warp& warp, unsigned inside, int point, int cell) {
  typename Value::Pair pair = {};
  if (inside >> point & 1) pair = __ldg((const typename Value::Pair*)(warp.value + (long long)cell * DIM));
  const float2 numbers_of_cell = numbers<VALUE>(pair);
  return numbers_of_cell.x * warp.grad_pair.x + numbers_of_cell.y * warp.grad_pair.y;
}

// Of two sums over the lanes that differ in `bit`, each lane keeps the one that its own bit names.
INLINE float halved(const Warp& warp, float first, float second, int bit) {
  const bool keeps_second = warp.lane & bit;
  return (keeps_second ? second : first) + __shfl_xor_sync(ALL, keeps_second ? first : second, bit);
}

// Of SIZE points from FIRST on, the products of grad_out with the values of the upper (x) and lower (y) row, summed
// over SIZE lanes: lane l keeps those of point FIRST + l % SIZE, lanes below 16 of the left cell, the others of the
// right one.
template <int FIRST, int SIZE> INLINE float2 products(const Warp& warp) {
  if constexpr (FIRST >= COUNT) {
    return make_float2(0.0f, 0.0f);
  } else if constexpr (SIZE == 1) {
    const int cell = __shfl_sync(ALL, warp.cell, FIRST);
    const float upper_left = __shfl_sync(ALL, warp.upper_left, FIRST);
    const float upper_right = __shfl_sync(ALL, warp.upper_right, FIRST);
    const float lower_left = __shfl_sync(ALL, warp.lower_left, FIRST);
    const float lower_right = __shfl_sync(ALL, warp.lower_right, FIRST);
    const int below = cell + warp.width[FIRST / POINTS];
    float* upper = warp.grad_value + (long long)cell * DIM;
    float* lower = warp.grad_value + (long long)below * DIM;
    const float2 found = make_float2(product(warp, warp.upper, FIRST, cell), product(warp, warp.lower, FIRST, below));
    // Nothing to add where a place lies on the line between cells: half of all additions of a new model.
    add_share(upper, upper_left, warp.grad);
    add_share(upper + DIM, upper_right, warp.grad);
    add_share(lower, lower_left, warp.grad);
    add_share(lower + DIM, lower_right, warp.grad);
    return found;
  } else {
    const float2 first = products<FIRST, SIZE / 2>(warp), second = products<FIRST + SIZE / 2, SIZE / 2>(warp);
    return make_float2(halved(warp, first.x, second.x, SIZE / 2), halved(warp, first.y, second.y, SIZE / 2));
  }
}

// What the inputs say about the point of a lane: its level and the first cell of that, its offset, what the offset is a
// multiple of, in cells, and its place, in cells from the middle of the first one. Steps 1 and 3 must round it alike: the
// products of step 2 belong to the cells of step 1.
struct Point {
  int level, height, width, start;
  float2 offset;
  float step_x, step_y, x, y;
};

INLINE Point point_of(int lane, const int* sizes, const float* anchors, const typename Offset::Pair* offsets) {
  Point point = {};
  point.level = lane < COUNT ? lane / POINTS : LEVELS - 1;
  int area = 0;
#pragma unroll
  for (int level = 0; level < LEVELS; ++level) {
    if (level <= point.level) {
      point.start += area;
      point.height = sizes[level] >> 16;
      point.width = sizes[level] & 0xffff;
      area = point.height * point.width;
    }
  }
  typename Offset::Pair pair = {};
  if (lane < COUNT) pair = __ldg(offsets + lane);
  point.offset = numbers<OFFSET>(pair);
  const float* anchor = anchors + point.level * COORDINATES;
  point.step_x = point.step_y = 1.0f;
  if (COORDINATES == 4) {
    point.step_x = anchor[2] * (point.width * (0.5f / POINTS));
    point.step_y = anchor[3] * (point.height * (0.5f / POINTS));
  }
  point.x = __fmaf_rn(point.offset.x, point.step_x, __fmaf_rn(anchor[0], (float)point.width, -0.5f));
  point.y = __fmaf_rn(point.offset.y, point.step_y, __fmaf_rn(anchor[1], (float)point.height, -0.5f));
  return point;
}

// Step 3: from the weight of the lane's point, and the products of grad_out with the values of the left and right cells
// around it, of the upper row in x and of the lower one in y.
INLINE void write_gradients(
    float weight, float2 dot_left, float2 dot_right, const int* sizes, const float* reference,
    const typename Offset::Bits* offsets, float* grad_reference, typename Offset::Bits* grad_offsets,
    typename Logit::Bits* grad_logits, int num_queries) {
  const int thread = settled((int)threadIdx.x), plane = settled((int)blockIdx.y);
  const int lane = thread % 32, head = plane % HEADS, image = plane / HEADS;
  const int query = settled((int)blockIdx.x) * WARPS + thread / 32;
  const bool there = lane < COUNT;
  const long long row = ((long long)image * num_queries + query) * HEADS + head;
  const float* anchors = settled(reference + ((long long)image * num_queries + query) * (LEVELS * COORDINATES));
  const Point point = point_of(lane, sizes, anchors, settled((const typename Offset::Pair*)offsets + row * COUNT));
  const float right = point.x - floorf(point.x), below = point.y - floorf(point.y);
  const float left = 1.0f - right, above = 1.0f - below;
  const float by_weight =
      above * (left * dot_left.x + right * dot_right.x) + below * (left * dot_left.y + right * dot_right.y);
  const float by_x = weight * (above * (dot_right.x - dot_left.x) + below * (dot_right.y - dot_left.y));
  const float by_y = weight * (left * (dot_left.y - dot_left.x) + right * (dot_right.y - dot_right.x));
  const float expected = sum_of_warp(there ? weight * by_weight : 0.0f);
  if (there) {
    grad_logits[row * COUNT + lane] = rounded<LOGIT>(weight * (by_weight - expected));
    ((typename Offset::Pair*)grad_offsets)[row * COUNT + lane] =
        rounded<OFFSET>(by_x * point.step_x, by_y * point.step_y);
  }
  if (REFERENCE_GRADIENT) {  // lane l adds up the points of level l
    float sum_x = 0.0f, sum_y = 0.0f, sum_width = 0.0f, sum_height = 0.0f;
#pragma unroll
    for (int other = 0; other < POINTS; ++other) {
      const int source = (lane * POINTS + other) % 32;
      sum_x += __shfl_sync(ALL, by_x, source);
      sum_y += __shfl_sync(ALL, by_y, source);
      if (COORDINATES == 4) {
        sum_width += __shfl_sync(ALL, by_x * point.offset.x, source);
        sum_height += __shfl_sync(ALL, by_y * point.offset.y, source);
      }
    }
    const int of_level = lane < LEVELS ? lane * POINTS : 0;
    const float width_of_level = __shfl_sync(ALL, (float)point.width, of_level);
    const float height_of_level = __shfl_sync(ALL, (float)point.height, of_level);
    if (lane < LEVELS) {
      float* target = grad_reference + (((long long)plane * num_queries + query) * LEVELS + lane) * COORDINATES;
      target[0] = sum_x * width_of_level;
      target[1] = sum_y * height_of_level;
      if (COORDINATES == 4) {
        target[2] = sum_width * (width_of_level * (0.5f / POINTS));
        target[3] = sum_height * (height_of_level * (0.5f / POINTS));
      }
    }
  }
}

// grad_value is float32, zero before; grad_reference has a part for each head. Grid: (queries / WARPS, images * HEADS).
extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) deformable_attention_backward(
    const typename Value::Bits* __restrict__ grad_out, const typename Value::Bits* __restrict__ value,
    const float* __restrict__ reference, const typename Offset::Bits* __restrict__ offsets,
    const typename Logit::Bits* __restrict__ logits, float* __restrict__ grad_value, float* __restrict__ grad_reference,
    typename Offset::Bits* __restrict__ grad_offsets, typename Logit::Bits* __restrict__ grad_logits, int num_queries,
    int num_tokens, int size0, int size1, int size2, int size3, int size4, int size5, int size6, int size7) {
  const int query = blockIdx.x * WARPS + threadIdx.x / 32;
  if (query >= num_queries) return;  // the whole warp
  const int lane = threadIdx.x % 32, head = blockIdx.y % HEADS, image = blockIdx.y / HEADS;
  const bool there = lane < COUNT;  // lanes without a point have numbers of their own, which reach nothing
  const long long row = ((long long)image * num_queries + query) * HEADS + head;

  // 1. One lane, one point.
  const float logit = there ? number<LOGIT>(logits[row * COUNT + lane]) : -INFINITY;
  const float largest = largest_of_warp(logit);
  const float exponential = there ? __expf(logit - largest) : 0.0f;
  const float weight = __fdividef(exponential, sum_of_warp(exponential));

  Warp warp;
  const int sizes[8] = {size0, size1, size2, size3, size4, size5, size6, size7};
#pragma unroll
  for (int level = 0; level < LEVELS; ++level) warp.width[level] = sizes[level] & 0xffff;
  const float* anchors = reference + ((long long)image * num_queries + query) * (LEVELS * COORDINATES);
  const Point point = point_of(lane, sizes, anchors, (const typename Offset::Pair*)offsets + row * COUNT);
  const int width = point.width, height = point.height;
  // The cell before a place, kept within two cells of the map. What is not finite stays so in the shares.
  const float before_x = floorf(point.x), before_y = floorf(point.y);
  const int column = (int)fminf(fmaxf(before_x, -2.0f), width + 1.0f);
  const int line = (int)fminf(fmaxf(before_y, -2.0f), height + 1.0f);
  const float right = point.x - before_x, below = point.y - before_y, left = 1.0f - right, above = 1.0f - below;
  const bool left_in = there && column >= 0 && column < width, right_in = there && column >= -1 && column < width - 1;
  const bool upper_in = line >= 0 && line < height, lower_in = line >= -1 && line < height - 1;
  warp.cell = point.start + line * width + column;
  warp.upper_left = upper_in && left_in ? weight * above * left : 0.0f;
  warp.upper_right = upper_in && right_in ? weight * above * right : 0.0f;
  warp.lower_left = lower_in && left_in ? weight * below * left : 0.0f;
  warp.lower_right = lower_in && right_in ? weight * below * right : 0.0f;
  const unsigned inside[4] = {
      __ballot_sync(ALL, upper_in && left_in), __ballot_sync(ALL, upper_in && right_in),
      __ballot_sync(ALL, lower_in && left_in), __ballot_sync(ALL, lower_in && right_in)};
  warp.upper = lane < 16 ? inside[0] : inside[1];
  warp.lower = lane < 16 ? inside[2] : inside[3];

  // 2. The points one after the other.
  warp.lane = lane;
  warp.grad = number<VALUE>(grad_out[row * DIM + lane]);
  warp.grad_pair.x = __shfl_sync(ALL, warp.grad, lane * 2 % 32);
  warp.grad_pair.y = __shfl_sync(ALL, warp.grad, lane * 2 % 32 + 1);
  warp.value = settled(value + (long long)blockIdx.y * num_tokens * DIM + lane * 2);
  warp.grad_value = settled(grad_value + (long long)blockIdx.y * num_tokens * DIM + lane);
  float2 dot_left = products<0, 16>(warp);  // of point l in lane l, here the upper row in x and the lower one in y
  float2 dot_right;
  dot_right.x = __shfl_xor_sync(ALL, dot_left.x, 16);
  dot_right.y = __shfl_xor_sync(ALL, dot_left.y, 16);
  if (COUNT > 16) {
    const float2 here = products<16, 16>(warp);
    const float other_x = __shfl_xor_sync(ALL, here.x, 16), other_y = __shfl_xor_sync(ALL, here.y, 16);
    if (lane >= 16) {
      dot_left = make_float2(other_x, other_y);
      dot_right = here;
    }
  }

  write_gradients(weight, dot_left, dot_right, sizes, reference, offsets, grad_reference, grad_offsets, grad_logits,
                  num_queries);
}
