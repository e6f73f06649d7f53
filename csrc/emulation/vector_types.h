// dim3 and CUDA's short vectors, with the alignment to which UBSan holds every access.
#pragma once

#define WSSS_VECTORS(name, type, alignment2, alignment4)                           \
    struct name##1 { type x; };                                                    \
    struct alignas(alignment2) name##2 { type x, y; };                             \
    struct name##3 { type x, y, z; };                                              \
    struct alignas(alignment4) name##4 { type x, y, z, w; };                       \
    constexpr name##1 make_##name##1(type x) { return {x}; }                       \
    constexpr name##2 make_##name##2(type x, type y) { return {x, y}; }            \
    constexpr name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; } \
    constexpr name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

WSSS_VECTORS(char, signed char, 2, 4)
WSSS_VECTORS(uchar, unsigned char, 2, 4)
WSSS_VECTORS(short, short, 4, 8)
WSSS_VECTORS(ushort, unsigned short, 4, 8)
WSSS_VECTORS(int, int, 8, 16)
WSSS_VECTORS(uint, unsigned, 8, 16)
WSSS_VECTORS(longlong, long long, 16, 16)
WSSS_VECTORS(ulonglong, unsigned long long, 16, 16)
WSSS_VECTORS(float, float, 8, 16)
WSSS_VECTORS(double, double, 16, 16)
#undef WSSS_VECTORS

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};
