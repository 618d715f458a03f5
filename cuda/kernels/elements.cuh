// Elements of rows of any format, as floats and as f16.
#pragma once
#include "types.cuh"

// Elements k .. k + 16 of a row of n_in, as floats; zeros beyond.
template <class T> __device__ __forceinline__ void load16_of(const uint8_t* row, int n_in, int k, float (&out)[16]) {
    if constexpr (T::BLOCK > 8) {
        int nb = n_in / T::BLOCK;
        Chunk<T>::enter(row, nb, k, Chunk<T>::ELEMENTS);
        T::load16(row, nb, k, out);
    } else {
        T::load16(row, n_in, k, out);
    }
}

template <class T> struct Of {
    using Type = T;
};
// Does something with the format of a type.
template <class F> __device__ __forceinline__ void with_format(uint32_t type, F f) {
    switch (type) {
        case F32: f(Of<TF32>()); break;
        case F16: f(Of<TF16>()); break;
        case BF16: f(Of<TBF16>()); break;
        case Q4_0: f(Of<TQ4_0>()); break;
        case Q4_1: f(Of<TQ4_1>()); break;
        case Q5_0: f(Of<TQ5_0>()); break;
        case Q5_1: f(Of<TQ5_1>()); break;
        case Q8_0: f(Of<TQ8_0>()); break;
        case IQ4_NL: f(Of<TIQ4_NL>()); break;
        case MXFP4: f(Of<TMXFP4>()); break;
        case IQ4_XS: f(Of<TIQ4_XS>()); break;
        case Q2_K: f(Of<TQ2_K>()); break;
        case Q3_K: f(Of<TQ3_K>()); break;
        case Q4_K: f(Of<TQ4_K>()); break;
        case Q5_K: f(Of<TQ5_K>()); break;
        case Q6_K: f(Of<TQ6_K>()); break;
    }
}
// The same as `load16_of` for a row of any format.
__device__ __forceinline__ void load16(uint32_t type, const uint8_t* row, int n_in, int k, float (&out)[16]) {
    with_format(type, [&](auto of) { load16_of<typename decltype(of)::Type>(row, n_in, k, out); });
}

// 16 floats as f16.
__device__ __forceinline__ void to_halves(uint4 (&h)[2], const float (&v)[16]) {
    uint32_t w[8];
#pragma unroll
    for (int i = 0; i < 8; i++) w[i] = uint32_t(float_to_half(v[2 * i])) | uint32_t(float_to_half(v[2 * i + 1])) << 16;
    h[0] = make_uint4(w[0], w[1], w[2], w[3]);
    h[1] = make_uint4(w[4], w[5], w[6], w[7]);
}
// To where 16 bytes are aligned.
__device__ __forceinline__ void store16(uint16_t* dst, const float (&v)[16]) {
    uint4 h[2];
    to_halves(h, v);
    reinterpret_cast<uint4*>(dst)[0] = h[0];
    reinterpret_cast<uint4*>(dst)[1] = h[1];
}
