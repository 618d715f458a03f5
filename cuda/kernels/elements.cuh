// Elements of rows of any format, as floats and as f16.
#pragma once
#include "types_k.cuh"

// What is to be loaded for the 16 N elements from k on, a multiple of that, of a row of n_in; k lies within the row.
template <class T, int N> __device__ __forceinline__ typename T::template Raw<N> raw_of(const uint8_t* row, int n_in, int k) {
    int nb = n_in;
    if (T::BLOCK > 8) {
        nb = n_in / T::BLOCK;
        Chunk<T>::enter(row, nb, k, Chunk<T>::ELEMENTS);
    }
    return T::template raw<N>(row, nb, k);
}
// Elements k .. k + 16 of a row of n_in, as floats; zeros beyond.
template <class T> __device__ __forceinline__ void load16_of(const uint8_t* row, int n_in, int k, float (&out)[16]) {
    if constexpr (T::BLOCK > 8) {
        const Units<1> u = T::template units<1>(raw_of<T, 1>(row, n_in, k), k);
#pragma unroll
        for (int i = 0; i < 16; i++) out[i] = u.s[0] * float(int(byte_of(word(u.v[0], i / 4), i % 4)) - T::BIAS) + u.m[0];
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
    for (int i = 0; i < 8; i++) w[i] = halves(v[2 * i], v[2 * i + 1]);
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

// 16 N elements from k on as f16. A byte becomes the last bits of 1024 + byte in half precision: from there on two elements share an instruction.
template <class T, int N> __device__ __forceinline__ void halves_of(uint4 (&h)[2 * N], const typename T::template Raw<N>& raw, int k) {
    if constexpr (T::BLOCK > 8) {
        const Units<N> u = T::template units<N>(raw, k);
        constexpr uint32_t ZERO = 0x64006400u + 0x00010001u * T::BIAS;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const uint32_t s = halves(u.s[i], u.s[i]), m = halves(u.m[i], u.m[i]);
            auto pair = [s, m](uint32_t w, uint32_t bytes) { return fma_halves(sub_halves(pick_bytes(w, 0x64646464u, bytes), ZERO), s, m); };
            const uint4 v = u.v[i];
            h[2 * i] = make_uint4(pair(v.x, 0x4140), pair(v.x, 0x4342), pair(v.y, 0x4140), pair(v.y, 0x4342));
            h[2 * i + 1] = make_uint4(pair(v.z, 0x4140), pair(v.z, 0x4342), pair(v.w, 0x4140), pair(v.w, 0x4342));
        }
    } else {
        T::halves(raw, h);
    }
}
